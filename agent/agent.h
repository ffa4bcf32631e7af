/* The agent process: one session with the host, many channels. */
#pragma once
#include <poll.h>

#include "init.h"
#include "util.h"
#include "wire.h"

enum { MAX_CHANNELS = 128, QUEUE_HIGH = 1 << 20, CHUNK = 32768 };

struct walk; /* files.c */

/* One operation under way. Descriptors are -1 when closed; `revents` are those of the last poll. */
struct channel {
    struct channel *next;
    uint32_t id;
    enum { CHANNEL_EXEC, CHANNEL_READ, CHANNEL_WRITE } kind;
    bool detached; /* its session is over: nothing is sent, output is thrown away */
    bool finished; /* to be freed */
    int64_t credit; /* bytes we may send; below zero when the last frame was larger */

    pid_t pid;
    bool tty, exited, timed_out, stdin_ended;
    int status;
    int in, out, err;
    short in_revents, out_revents, err_revents;
    struct bytes input;
    int64_t deadline; /* ms, 0 none: when to kill */
    size_t drained; /* bytes read after the end */
    int64_t drain_until; /* ms: terminal output of an ended process may still be under way */

    struct walk *walk;

    int file;
    int64_t written;
};

struct queued {
    struct queued *next;
    size_t size;
    uint8_t data[];
};

struct agent {
    const struct config *config;
    struct shared *shared;
    int control, console;
    int port, listener, epoll; /* port: the byte stream; listener: vsock only */
    bool session;
    struct decoder decoder;
    int64_t last_input; /* ms: when the host was last heard */
    bool stall_seen;
    struct queued *head, **tail;
    size_t head_sent, queued;
    struct channel *channels;
    size_t channel_count;
};

struct pollset {
    struct pollfd fds[MAX_CHANNELS * 3 + 4];
    short *revents[MAX_CHANNELS * 3 + 4];
    nfds_t count;
};
void poll_add(struct pollset *set, int fd, short events, short *revents);

void send_frame(struct agent *agent, uint8_t type, uint32_t channel, const void *payload, size_t size);
void send_text(struct agent *agent, uint8_t type, uint32_t channel, const struct text_builder *text);
void send_error(struct agent *agent, uint32_t channel, int number, const char *what);
void send_credit(struct agent *agent, struct channel *channel, size_t count);
/* NULL, with ERROR sent, when there are too many. */
struct channel *channel_add(struct agent *agent, uint32_t id, int kind);
void state_text(struct agent *agent, struct text_builder *text);

void exec_start(struct agent *agent, uint32_t id, const struct text_list *request);
void exec_frame(struct agent *agent, struct channel *channel, const struct frame *frame);
void exec_poll(struct agent *agent, struct channel *channel, struct pollset *set, int64_t *wake);
void exec_service(struct agent *agent, struct channel *channel);
void exec_detach(struct channel *channel);
void exec_reaped(struct agent *agent, pid_t pid, int status);
void exec_free(struct channel *channel);

void file_stat(struct agent *agent, uint32_t id, const struct text_list *request);
void file_read(struct agent *agent, uint32_t id, const struct text_list *request);
void file_write(struct agent *agent, uint32_t id, const struct text_list *request);
void write_frame(struct agent *agent, struct channel *channel, const struct frame *frame);
void read_service(struct agent *agent, struct channel *channel);
void file_free(struct channel *channel);

void identify(struct agent *agent, uint32_t id, const struct text_list *request);
