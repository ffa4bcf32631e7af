#include "wire.h"

#include <string.h>

static uint32_t crc32(const uint8_t *data, size_t size) {
    uint32_t crc = ~0u;
    while (size--) {
        crc ^= *data++;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (0xEDB88320u & -(crc & 1));
    }
    return ~crc;
}

uint32_t load32(const uint8_t *at) {
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

void store32(uint8_t *at, uint32_t value) {
    for (int i = 0; i < 4; i++)
        at[i] = (uint8_t)(value >> 8 * i);
}

void store_header(uint8_t *at, uint8_t type, uint32_t channel, uint32_t size) {
    memcpy(at, "SFA1", 4);
    store32(at + 4, type);
    store32(at + 8, channel);
    store32(at + 12, size);
    store32(at + 16, crc32(at, 16));
}

static bool valid_header(const uint8_t *at) {
    return !memcmp(at, "SFA1", 4) && load32(at + 12) <= MAX_PAYLOAD && load32(at + 16) == crc32(at, 16);
}

static void drop(struct decoder *d, size_t count) {
    d->have -= count;
    memmove(d->buffer, d->buffer + count, d->have);
}

uint8_t *decoder_space(struct decoder *d, size_t *size) {
    *size = sizeof d->buffer - d->have;
    return d->buffer + d->have;
}

bool decoder_next(struct decoder *d, struct frame *frame) {
    drop(d, d->taken);
    d->taken = 0;
    size_t skip = 0;
    while (d->have - skip >= HEADER_SIZE && !valid_header(d->buffer + skip))
        skip++;
    drop(d, skip);
    if (d->have < HEADER_SIZE)
        return false;
    size_t size = load32(d->buffer + 12);
    if (d->have < HEADER_SIZE + size)
        return false;
    *frame = (struct frame){d->buffer[4], load32(d->buffer + 8), d->buffer + HEADER_SIZE, size};
    d->taken = HEADER_SIZE + size;
    return true;
}

bool decoder_stalled_hello(struct decoder *d, struct frame *frame) {
    size_t whole = HEADER_SIZE + NONCE_SIZE;
    if (d->have < whole)
        return false;
    uint8_t *at = d->buffer + d->have - whole;
    if (!valid_header(at) || at[4] != HELLO || load32(at + 12) != NONCE_SIZE)
        return false;
    *frame = (struct frame){HELLO, 0, at + HEADER_SIZE, NONCE_SIZE};
    d->taken = d->have;
    return true;
}
