/* The agent's loop: the byte stream to the host, the session, and the channels' turns. */
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/inotify.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define PORT_NAME "org.stillframe.agent"
#define VSOCK_PORT 2222
enum { STALL_MS = 100, DISCONNECTED_MS = 500 };

/* linux/vm_sockets.h is not part of musl's headers. */
struct vsock_address {
    unsigned short family, reserved;
    unsigned int port, cid;
    unsigned char flags, zero[3];
};

/* -- sending -------------------------------------------------------------------------------------- */

void send_frame(struct agent *a, uint8_t type, uint32_t channel, const void *payload, size_t size) {
    if (!a->session)
        return;
    struct queued *q = must(malloc(sizeof *q + HEADER_SIZE + size));
    q->next = NULL;
    q->size = HEADER_SIZE + size;
    store_header(q->data, type, channel, (uint32_t)size);
    if (size)
        memcpy(q->data + HEADER_SIZE, payload, size);
    *a->tail = q;
    a->tail = &q->next;
    a->queued += q->size;
}

void send_text(struct agent *a, uint8_t type, uint32_t channel, const struct text_builder *text) {
    if (text->overflow)
        send_error(a, channel, ENAMETOOLONG, "answer too long");
    else
        send_frame(a, type, channel, text->data, text->size);
}

void send_error(struct agent *a, uint32_t channel, int number, const char *what) {
    struct text_builder text = {.size = 0};
    text_add(&text, "errno", errno_name(number));
    text_addf(&text, "message", "%.300s: %s", what, strerror(number));
    send_frame(a, ERROR, channel, text.data, text.size);
}

void send_credit(struct agent *a, struct channel *c, size_t count) {
    uint8_t payload[4];
    store32(payload, (uint32_t)count);
    if (count && !c->detached)
        send_frame(a, CREDIT, c->id, payload, sizeof payload);
}

static void pop_head(struct agent *a) {
    struct queued *q = a->head;
    a->head = q->next;
    a->queued -= q->size;
    a->head_sent = 0;
    if (!a->head)
        a->tail = &a->head;
    free(q);
}

/* A frame already begun is finished: cutting it would swallow the frames after it. */
static void discard_queue(struct agent *a) {
    struct queued *begun = a->head_sent ? a->head : NULL;
    struct queued *rest = begun ? begun->next : a->head;
    while (rest) {
        struct queued *next = rest->next;
        a->queued -= rest->size;
        free(rest);
        rest = next;
    }
    a->head = begun;
    if (begun)
        begun->next = NULL;
    a->tail = begun ? &begun->next : &a->head;
}

static void pump_out(struct agent *a) {
    while (a->head && a->port >= 0) {
        ssize_t count = write(a->port, a->head->data + a->head_sent, a->head->size - a->head_sent);
        if (count <= 0)
            return;
        a->head_sent += (size_t)count;
        if (a->head_sent == a->head->size)
            pop_head(a);
    }
}

/* -- session -------------------------------------------------------------------------------------- */

void state_text(struct agent *a, struct text_builder *text) {
    static const char *const names[] = {"starting", "running", "exited"};
    char boot_id[64] = "";
    read_file("/proc/sys/kernel/random/boot_id", boot_id, sizeof boot_id);
    boot_id[strcspn(boot_id, "\n")] = 0;
    text_add(text, "version", "1");
    text_add(text, "charges", "entries");
    text_add(text, "boot_id", boot_id);
    text_add(text, "workload", names[a->shared->workload]);
    if (a->shared->workload == WORKLOAD_EXITED)
        text_addf(text, "exit_code", "%d", a->shared->exit_code);
}

static void end_session(struct agent *a) {
    a->session = false;
    discard_queue(a);
    for (struct channel *c = a->channels; c; c = c->next) {
        c->detached = true;
        if (c->kind == CHANNEL_EXEC)
            exec_detach(c);
        else
            c->finished = true;
    }
}

static void hello(struct agent *a, const struct frame *frame) {
    if (frame->size != NONCE_SIZE)
        return;
    end_session(a);
    a->session = true;
    struct text_builder text = {.size = NONCE_SIZE};
    memcpy(text.data, frame->payload, NONCE_SIZE);
    state_text(a, &text);
    send_text(a, HELLO_OK, 0, &text);
}

static void send_event(struct agent *a) {
    struct text_builder text = {.size = 0};
    state_text(a, &text);
    send_text(a, EVENT, 0, &text);
}

struct channel *channel_add(struct agent *a, uint32_t id, int kind) {
    if (a->channel_count >= MAX_CHANNELS) {
        send_error(a, id, EMFILE, "too many operations at once");
        return NULL;
    }
    struct channel *c = must(calloc(1, sizeof *c));
    c->id = id;
    c->kind = kind;
    c->credit = INITIAL_CREDIT;
    c->in = c->out = c->err = c->file = -1;
    c->next = a->channels;
    a->channels = c;
    a->channel_count++;
    return c;
}

static void free_finished(struct agent *a) {
    for (struct channel **at = &a->channels; *at;) {
        struct channel *c = *at;
        if (!c->finished) {
            at = &c->next;
            continue;
        }
        *at = c->next;
        exec_free(c);
        file_free(c);
        free(c);
        a->channel_count--;
    }
}

static void shutdown_guest(struct agent *a, uint32_t id, const struct text_list *request) {
    struct control_message message = {SHUTDOWN_REQUESTED, atoi(text_list_get(request, "grace_ms", "5000"))};
    if (send(a->control, &message, sizeof message, MSG_DONTWAIT) < 0)
        send_error(a, id, errno, "shutdown");
    else
        send_frame(a, OK, id, NULL, 0);
}

static void request(struct agent *a, const struct frame *frame) {
    struct text_list list;
    if (!text_list_open(&list, frame->payload, frame->size))
        return send_error(a, frame->channel, EPROTO, "text list");
    switch (frame->type) {
    case EXEC: return exec_start(a, frame->channel, &list);
    case STAT: return file_stat(a, frame->channel, &list);
    case READ: return file_read(a, frame->channel, &list);
    case WRITE: return file_write(a, frame->channel, &list);
    case IDENTIFY: return identify(a, frame->channel, &list);
    case SHUTDOWN: return shutdown_guest(a, frame->channel, &list);
    }
}

static void channel_frame(struct agent *a, struct channel *c, const struct frame *frame) {
    if (frame->type == CREDIT && frame->size == 4) {
        int64_t credit = c->credit + load32(frame->payload);
        c->credit = credit > 1 << 30 ? 1 << 30 : credit;
    } else if (c->kind == CHANNEL_EXEC) {
        exec_frame(a, c, frame);
    } else if (frame->type == CLOSE) {
        c->finished = true;
    } else if (c->kind == CHANNEL_WRITE) {
        write_frame(a, c, frame);
    }
}

static void handle(struct agent *a, const struct frame *frame) {
    if (frame->type == HELLO)
        return hello(a, frame);
    if (!a->session || frame->channel == 0)
        return;
    for (struct channel *c = a->channels; c; c = c->next)
        if (c->id == frame->channel && !c->detached && !c->finished)
            return channel_frame(a, c, frame);
    request(a, frame);
}

/* -- transport ------------------------------------------------------------------------------------ */

static void watch_fd(struct agent *a, int fd) {
    /* Edge-triggered: a port without a host always reports HUP, which must wake us only once. */
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.fd = fd};
    epoll_ctl(a->epoll, EPOLL_CTL_ADD, fd, &event);
}

static void disconnected(struct agent *a) {
    if (a->session)
        end_session(a);
    while (a->head)
        pop_head(a);
    a->decoder.have = a->decoder.taken = 0;
    if (a->listener >= 0 && a->port >= 0) {
        close(a->port);
        a->port = -1;
    }
}

/* Reads what is there; false when no host is connected. */
static bool pump_in(struct agent *a) {
    struct frame frame;
    while (a->port >= 0) {
        size_t space;
        uint8_t *at = decoder_space(&a->decoder, &space);
        ssize_t count = read(a->port, at, space);
        if (count < 0 && (errno == EAGAIN || errno == EINTR))
            return true;
        if (count <= 0)
            return false;
        a->decoder.have += (size_t)count;
        a->last_input = now_ms();
        a->stall_seen = false;
        while (decoder_next(&a->decoder, &frame))
            handle(a, &frame);
    }
    return false;
}

static void accept_host(struct agent *a) {
    int fd = accept4(a->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0)
        return;
    disconnected(a); /* one host at a time; the newest is the real one */
    a->port = fd;
    watch_fd(a, fd);
}

/* Opens the virtio-serial port of our name; -1 while it does not exist. */
static int find_port(void) {
    char path[300], name[64];
    int fd = -1;
    DIR *directory = opendir("/sys/class/virtio-ports");
    for (struct dirent *entry; directory && fd < 0 && (entry = readdir(directory));) {
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        if (entry->d_name[0] == '.' || read_file(path, name, sizeof name) < 0)
            continue;
        name[strcspn(name, "\n")] = 0;
        snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        if (!strcmp(name, PORT_NAME))
            fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    }
    if (directory)
        closedir(directory);
    return fd;
}

static void open_port(struct agent *a) {
    int notify = inotify_init1(IN_CLOEXEC | IN_NONBLOCK), wait = 20;
    inotify_add_watch(notify, "/dev", IN_CREATE);
    while ((a->port = find_port()) < 0) {
        /* The name arrives a moment after the device and is not announced: look again soon, then seldom. */
        struct pollfd fd = {.fd = notify, .events = POLLIN};
        char ignored[4096];
        poll(&fd, 1, wait);
        while (read(notify, ignored, sizeof ignored) > 0)
            ;
        wait = wait < 1000 ? wait + wait / 4 : 1000;
    }
    close(notify);
    watch_fd(a, a->port);
}

static void open_vsock(struct agent *a) {
    struct vsock_address address = {.family = AF_VSOCK, .port = VSOCK_PORT, .cid = ~0u};
    a->listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (a->listener < 0 || bind(a->listener, (struct sockaddr *)&address, sizeof address) || listen(a->listener, 8)) {
        fprintf(stderr, "stillframe-agent: vsock: %s\n", strerror(errno));
        sleep(1);
        _exit(71);
    }
}

/* -- loop ----------------------------------------------------------------------------------------- */

void poll_add(struct pollset *set, int fd, short events, short *revents) {
    *revents = 0;
    if (fd < 0)
        return;
    set->fds[set->count] = (struct pollfd){.fd = fd, .events = events};
    set->revents[set->count++] = revents;
}

static void reap(struct agent *a) {
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
        exec_reaped(a, pid, status);
}

static void service(struct agent *a) {
    for (struct channel *c = a->channels; c; c = c->next) {
        if (c->finished)
            continue;
        if (c->kind == CHANNEL_EXEC)
            exec_service(a, c);
        else if (c->kind == CHANNEL_READ)
            read_service(a, c);
    }
    free_finished(a);
}

static int timeout_until(int64_t wake) {
    if (!wake)
        return -1;
    int64_t left = wake - now_ms();
    return left < 0 ? 0 : left > 3600000 ? 3600000 : (int)left;
}

static void sooner(int64_t *wake, int64_t at) {
    if (!*wake || at < *wake)
        *wake = at;
}

/* True when a READ could go on at once: it waits for nothing but its turn. */
static bool busy(const struct agent *a) {
    for (const struct channel *c = a->channels; c; c = c->next)
        if (c->kind == CHANNEL_READ && !c->finished && c->credit > 0 && a->queued < QUEUE_HIGH)
            return true;
    return false;
}

_Noreturn static void loop(struct agent *a, int signals) {
    static struct pollset set;
    struct frame frame;
    short port_events, control_events, signal_events, listener_events;
    for (bool connected = true;;) {
        int64_t wake = 0;
        set.count = 0;
        poll_add(&set, a->epoll, POLLIN, &port_events);
        poll_add(&set, a->control, POLLIN, &control_events);
        poll_add(&set, signals, POLLIN, &signal_events);
        poll_add(&set, a->listener, POLLIN, &listener_events);
        for (struct channel *c = a->channels; c; c = c->next)
            if (c->kind == CHANNEL_EXEC)
                exec_poll(a, c, &set, &wake);
        bool partial = a->decoder.have > a->decoder.taken;
        if (partial && !a->stall_seen)
            sooner(&wake, a->last_input + STALL_MS);
        if (!connected && a->listener < 0) /* the edge of a new host wakes us; this is for a missed one */
            sooner(&wake, now_ms() + DISCONNECTED_MS);
        int count = poll(set.fds, set.count, busy(a) ? 0 : timeout_until(wake));
        for (nfds_t i = 0; i < set.count; i++)
            *set.revents[i] = count > 0 ? set.fds[i].revents : 0;
        struct epoll_event events[4];
        epoll_wait(a->epoll, events, 4, 0);
        struct signalfd_siginfo info;
        while (signal_events && read(signals, &info, sizeof info) > 0)
            ;
        reap(a);
        if (listener_events)
            accept_host(a);
        connected = pump_in(a);
        if (!connected)
            disconnected(a);
        if (partial && !a->stall_seen && now_ms() - a->last_input >= STALL_MS) {
            a->stall_seen = true; /* looked at once; only more bytes can change it */
            if (decoder_stalled_hello(&a->decoder, &frame))
                handle(a, &frame);
        }
        struct control_message message;
        if (control_events && recv(a->control, &message, sizeof message, MSG_DONTWAIT) > 0)
            send_event(a);
        service(a);
        pump_out(a);
    }
}

_Noreturn void agent_main(const struct config *config, struct shared *shared, int control, int console) {
    static struct agent agent;
    struct agent *a = &agent;
    *a = (struct agent){.config = config, .shared = shared, .control = control, .console = console};
    a->port = a->listener = -1;
    a->tail = &a->head;
    write_file("/proc/self/oom_score_adj", "-1000", 5, 0);
    signal(SIGPIPE, SIG_IGN);
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGCHLD);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    int signals = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
    a->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (config->vsock)
        open_vsock(a);
    else
        open_port(a);
    dprintf(console, "STILLFRAME-AGENT-READY nonce=%s\n", text_list_get(&config->list, "nonce", ""));
    loop(a, signals);
}
