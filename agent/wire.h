/* Frames of the agent protocol, version 1 (docs/agent-protocol.md). */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { HEADER_SIZE = 20, MAX_PAYLOAD = 65536, INITIAL_CREDIT = 262144, NONCE_SIZE = 16 };

enum frame_type {
    HELLO = 1, HELLO_OK, EVENT,
    EXEC = 16, STDIN, RESIZE, SIGNAL, STDOUT, STDERR, EXIT, CREDIT, CLOSE,
    STAT = 32, READ, WRITE, IDENTIFY, SHUTDOWN,
    OK = 48, ENTRY, DATA, END, ERROR,
};

struct frame {
    uint8_t type;
    uint32_t channel;
    const uint8_t *payload;
    size_t size;
};

/* Holds at most one frame; whatever is not a header is skipped byte by byte. */
struct decoder {
    uint8_t buffer[HEADER_SIZE + MAX_PAYLOAD];
    size_t have, taken;
};

uint32_t load32(const uint8_t *at);
void store32(uint8_t *at, uint32_t value);
void store_header(uint8_t *at, uint8_t type, uint32_t channel, uint32_t size);

/* Where to read next, and how much fits. */
uint8_t *decoder_space(struct decoder *decoder, size_t *size);
/* Next whole frame; its payload is valid until the next call on this decoder. */
bool decoder_next(struct decoder *decoder, struct frame *frame);
/* A stalled partial frame that ends in a whole HELLO: the host is new and this is its greeting. */
bool decoder_stalled_hello(struct decoder *decoder, struct frame *frame);
