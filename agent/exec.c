/* Commands: pipes or a terminal, credit, signals, time limits. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "agent.h"

#ifndef TIOCGPTPEER
#define TIOCGPTPEER 0x5441
#endif

/* AFTER_BYTES: the most a pipe can hold; more than that after the end was written by somebody else. */
enum { DRAIN_MS = 50, TIMEOUT_CODE = 124, TURNS = 16, AFTER_BYTES = 1 << 20 };

struct plan {
    const struct agent *agent;
    const struct text_list *request;
    bool tty;
    int in[2], out[2], err[2], report[2]; /* [0] read, [1] write */
    int terminal;
};

struct report {
    int error;
    char stage[28];
};

_Noreturn static void child_failed(struct plan *p, int error, const char *stage) {
    struct report report = {.error = error};
    snprintf(report.stage, sizeof report.stage, "%s", stage);
    if (write(p->report[1], &report, sizeof report) < 0)
        _exit(126);
    _exit(127);
}

static void child_streams(struct plan *p) {
    if (p->tty) {
        int slave = ioctl(p->terminal, TIOCGPTPEER, O_RDWR | O_NOCTTY);
        if (slave < 0 || ioctl(slave, TIOCSCTTY, 0))
            child_failed(p, errno, "terminal");
        dup2(slave, 0);
        dup2(slave, 1);
        dup2(slave, 2);
        if (slave > 2)
            close(slave);
        return;
    }
    dup2(p->in[0], 0);
    dup2(p->out[1], 1);
    dup2(p->err[1], 2);
}

static char **child_environment(struct plan *p, const struct account *account) {
    char **extra = text_list_all(p->request, "env", 0);
    size_t count = 1;
    for (char **at = extra; *at; at++)
        count++;
    environ = workload_environment(p->agent->config, account, count);
    char **end = environ;
    while (*end)
        end++;
    for (; *extra; extra++) { /* the later value of a name wins */
        size_t name = strcspn(*extra, "=");
        char **at = environ;
        while (*at && (strncmp(*at, *extra, name) || (*at)[name] != '='))
            at++;
        if (at == end)
            end++;
        *at = *extra;
    }
    return environ;
}

_Noreturn static void child(struct plan *p) {
    struct account account;
    const char *user = text_list_get(p->request, "user", "");
    const char *cwd = text_list_get(p->request, "cwd", "");
    char **arguments = text_list_all(p->request, "arg", 0);
    process_defaults();
    child_streams(p);
    int error = -find_account(user, &account);
    if (!error && p->tty && fchown(0, account.uid, (gid_t)-1) && errno != EROFS)
        error = errno;
    if (!error)
        error = -become(&account);
    if (error)
        child_failed(p, error, "user");
    if (!*cwd)
        cwd = text_list_get(&p->agent->config->list, "cwd", "/");
    if (chdir(*cwd ? cwd : "/"))
        child_failed(p, errno, "cwd");
    char **environment = child_environment(p, &account);
    if (p->tty) {
        bool term = false;
        for (char **at = environment; *at; at++)
            term |= !strncmp(*at, "TERM=", 5);
        if (!term)
            setenv("TERM", "xterm", 1);
    }
    execvp(arguments[0], arguments);
    child_failed(p, errno, "exec");
}

static void close_pair(int pair[2]) {
    for (int i = 0; i < 2; i++)
        if (pair[i] >= 0)
            close(pair[i]);
}

static void resize(int terminal, unsigned rows, unsigned columns) {
    struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)columns};
    ioctl(terminal, TIOCSWINSZ, &size);
}

static int open_streams(struct plan *p) {
    if (pipe2(p->report, O_CLOEXEC))
        return errno;
    if (!p->tty)
        return pipe2(p->in, O_CLOEXEC) || pipe2(p->out, O_CLOEXEC) || pipe2(p->err, O_CLOEXEC) ? errno : 0;
    p->terminal = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (p->terminal < 0 || grantpt(p->terminal) || unlockpt(p->terminal))
        return errno;
    resize(p->terminal, (unsigned)atoi(text_list_get(p->request, "rows", "24")),
           (unsigned)atoi(text_list_get(p->request, "cols", "80")));
    return 0;
}

/* Moves our ends of the streams into the channel, non-blocking. */
static void adopt_streams(struct plan *p, struct channel *c) {
    if (p->tty) {
        c->in = c->out = p->terminal;
        p->terminal = -1;
    } else {
        c->in = p->in[1];
        c->out = p->out[0];
        c->err = p->err[0];
        p->in[1] = p->out[0] = p->err[0] = -1;
    }
    int ours[] = {c->in, c->out, c->err};
    for (int i = 0; i < 3; i++)
        if (ours[i] >= 0)
            fcntl(ours[i], F_SETFL, fcntl(ours[i], F_GETFL) | O_NONBLOCK);
}

static void launch(struct agent *a, struct plan *p, struct channel *c) {
    struct report report = {0};
    int error = open_streams(p);
    if (!error && (c->pid = fork()) == 0)
        child(p);
    if (!error && c->pid < 0)
        error = errno;
    if (!error) {
        close(p->report[1]);
        p->report[1] = -1;
        if (read(p->report[0], &report, sizeof report) == sizeof report)
            error = report.error; /* the child ends by itself and is reaped as nobody's */
    }
    if (error) {
        send_error(a, c->id, error, *report.stage ? report.stage : "start");
        c->pid = 0;
        c->finished = true;
        return;
    }
    adopt_streams(p, c);
    double limit = atof(text_list_get(p->request, "timeout", "0"));
    if (limit > 0)
        c->deadline = now_ms() + (limit > 1e9 ? (int64_t)1e12 : (int64_t)(limit * 1000) + 1);
}

void exec_start(struct agent *a, uint32_t id, const struct text_list *request) {
    struct plan plan = {.agent = a, .request = request, .in = {-1, -1}, .out = {-1, -1}, .err = {-1, -1},
                        .report = {-1, -1}, .terminal = -1};
    if (!text_list_get(request, "arg", NULL))
        return send_error(a, id, EINVAL, "no command");
    struct channel *c = channel_add(a, id, CHANNEL_EXEC);
    if (!c)
        return;
    plan.tty = c->tty = !strcmp(text_list_get(request, "tty", "0"), "1");
    launch(a, &plan, c);
    close_pair(plan.in);
    close_pair(plan.out);
    close_pair(plan.err);
    close_pair(plan.report);
    if (plan.terminal >= 0)
        close(plan.terminal);
}

static void close_in(struct channel *c) {
    if (c->in >= 0 && !c->tty)
        close(c->in);
    c->in = -1;
    bytes_free(&c->input);
}

static void signal_group(const struct channel *c, int number) {
    if (c->pid > 0 && !c->exited)
        kill(-c->pid, number);
}

static void take_input(struct agent *a, struct channel *c, const struct frame *frame) {
    if (c->stdin_ended)
        return;
    if (!frame->size)
        c->stdin_ended = true;
    else if (c->in < 0) /* nobody reads any more: the credit goes straight back */
        send_credit(a, c, frame->size);
    else if (c->input.size + frame->size <= INITIAL_CREDIT)
        bytes_add(&c->input, frame->payload, frame->size);
}

void exec_frame(struct agent *a, struct channel *c, const struct frame *frame) {
    const uint8_t *p = frame->payload;
    if (frame->type == STDIN)
        take_input(a, c, frame);
    else if (frame->type == RESIZE && frame->size == 4 && c->tty && c->out >= 0)
        resize(c->out, p[0] | p[1] << 8, p[2] | p[3] << 8);
    else if (frame->type == SIGNAL && frame->size == 4 && load32(p) < 65)
        signal_group(c, (int)load32(p));
    else if (frame->type == CLOSE) {
        signal_group(c, SIGHUP);
        c->detached = true;
        exec_detach(c);
    }
}

void exec_detach(struct channel *c) {
    c->stdin_ended = true;
    bytes_free(&c->input);
}

static bool may_read(const struct agent *a, const struct channel *c) {
    return c->detached || (c->credit > 0 && a->queued < QUEUE_HIGH);
}

static void sooner(int64_t *wake, int64_t at) {
    if (at && (!*wake || at < *wake))
        *wake = at;
}

void exec_poll(struct agent *a, struct channel *c, struct pollset *set, int64_t *wake) {
    bool reading = may_read(a, c);
    poll_add(set, c->input.size ? c->in : -1, POLLOUT, &c->in_revents);
    poll_add(set, reading ? c->out : -1, POLLIN, &c->out_revents);
    poll_add(set, reading ? c->err : -1, POLLIN, &c->err_revents);
    sooner(wake, c->deadline);
    sooner(wake, c->drain_until);
}

static void feed(struct agent *a, struct channel *c) {
    while (c->in >= 0 && c->input.size) {
        ssize_t count = write(c->in, c->input.data + c->input.start, c->input.size);
        if (count < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (count < 0) { /* EPIPE: the command closed its input */
            send_credit(a, c, c->input.size);
            close_in(c);
            return;
        }
        bytes_drop(&c->input, (size_t)count);
        send_credit(a, c, (size_t)count);
    }
    if (!c->stdin_ended || c->in < 0)
        return;
    if (c->tty) {
        if (write(c->in, "\4", 1) < 0 && errno == EAGAIN)
            return;
    }
    close_in(c);
}

/* Reads one stream as far as credit allows; true when nothing is left for now or for ever. */
static bool drain(struct agent *a, struct channel *c, int *fd, uint8_t type) {
    uint8_t chunk[CHUNK];
    for (int turn = 0; *fd >= 0; turn++) {
        if (turn == TURNS || !may_read(a, c)) /* a flood must not keep the others waiting */
            return c->drained >= AFTER_BYTES;
        size_t most = c->detached || c->credit > CHUNK ? CHUNK : (size_t)c->credit;
        ssize_t count = read(*fd, chunk, most);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0 && errno == EAGAIN)
            return true;
        if (count <= 0) { /* EIO is the end of a terminal */
            if (c->tty)
                c->in = -1;
            close(*fd);
            *fd = -1;
            return true;
        }
        if (c->exited)
            c->drained += (size_t)count;
        if (c->detached)
            continue;
        c->credit -= count;
        send_frame(a, type, c->id, chunk, (size_t)count);
    }
    return true;
}

static void finish(struct agent *a, struct channel *c) {
    uint8_t payload[4];
    int code = c->timed_out ? TIMEOUT_CODE
               : WIFEXITED(c->status) ? WEXITSTATUS(c->status) : 128 + WTERMSIG(c->status);
    store32(payload, (uint32_t)code);
    if (!c->detached)
        send_frame(a, EXIT, c->id, payload, sizeof payload);
    c->finished = true;
}

void exec_service(struct agent *a, struct channel *c) {
    if (c->deadline && now_ms() >= c->deadline) {
        c->timed_out = !c->exited;
        signal_group(c, SIGKILL);
        c->deadline = 0;
    }
    feed(a, c);
    bool empty = true;
    if (c->exited || c->out_revents)
        empty &= drain(a, c, &c->out, STDOUT);
    if (c->exited || c->err_revents)
        empty &= drain(a, c, &c->err, STDERR);
    if (!c->exited || !empty)
        return;
    /* A background child may keep a pipe open for ever: the command has ended, and so does its output. A
       terminal hands over what was written a moment later. */
    if (c->tty && c->out >= 0 && !c->drain_until)
        c->drain_until = now_ms() + DRAIN_MS;
    if (!c->tty || c->out < 0 || now_ms() >= c->drain_until)
        finish(a, c);
}

void exec_reaped(struct agent *a, pid_t pid, int status) {
    for (struct channel *c = a->channels; c; c = c->next)
        if (c->kind == CHANNEL_EXEC && c->pid == pid && !c->exited) {
            c->exited = true;
            c->status = status;
        }
}

void exec_free(struct channel *c) {
    close_in(c);
    if (c->out >= 0)
        close(c->out);
    if (c->err >= 0)
        close(c->err);
    c->out = c->err = -1;
}
