/* Small things every part of the agent needs: text lists, files, time, byte queues. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* A text list is `key NUL value NUL` repeated (docs/agent-protocol.md). It is only viewed, never copied. */
struct text_list {
    const char *data;
    size_t size;
};

/* False when the bytes are not a whole text list. */
bool text_list_open(struct text_list *list, const void *data, size_t size);
/* Next pair from *at (start with 0); false at the end. */
bool text_list_next(const struct text_list *list, size_t *at, const char **key, const char **value);
/* Last value of `key`, or `fallback`. */
const char *text_list_get(const struct text_list *list, const char *key, const char *fallback);
/* NULL-terminated array of all values of `key`, `extra` free slots at the end; free() it. */
char **text_list_all(const struct text_list *list, const char *key, size_t extra);

/* A text list being written; overflow is remembered, not fatal. */
struct text_builder {
    char data[16384];
    size_t size;
    bool overflow;
};
void text_add(struct text_builder *builder, const char *key, const char *value);
void text_addf(struct text_builder *builder, const char *key, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

struct bytes {
    uint8_t *data;
    size_t start, size, capacity;
};
void bytes_add(struct bytes *bytes, const void *data, size_t size);
void bytes_drop(struct bytes *bytes, size_t count);
void bytes_free(struct bytes *bytes);

void *must(void *memory); /* ends the process when an allocation failed; init starts the agent again */
int64_t now_ms(void);     /* CLOCK_MONOTONIC */
ssize_t read_file(const char *path, char *buffer, size_t size); /* NUL-terminates; -1 on error */
int write_file(const char *path, const char *text, size_t size, int mode); /* truncates; 0 or -errno */
int make_directories(const char *path); /* the parents of `path`; 0 or -errno */
const char *errno_name(int number);
int hex_decode(const char *hex, uint8_t *out, size_t capacity); /* bytes, or -1 */
int credit_entropy(const uint8_t *seed, size_t size);           /* RNDADDENTROPY + RNDRESEEDCRNG; 0 or -errno */

struct account {
    uid_t uid;
    gid_t gid;
    gid_t groups[64];
    size_t group_count;
    char home[256];
};
/* Resolves `name|uid[:group|gid]` by the root's /etc/passwd and /etc/group; 0 or -errno. */
int find_account(const char *user, struct account *account);
