#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

static struct config config;
static struct shared *shared;
static int console, control, agent_control;
static pid_t agent, workload;
static int64_t kill_at; /* ms, 0 while nobody asked for a shutdown */

static const char *nonce(void) {
    return text_list_get(&config.list, "nonce", "");
}

static void start_agent(void) {
    agent = fork();
    if (agent == 0) {
        close(control);
        agent_main(&config, shared, agent_control, console);
    }
}

static void tell_agent(void) {
    struct control_message message = {.kind = WORKLOAD_CHANGED};
    send(control, &message, sizeof message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* Ends every other process, the agent last told; then the machine. */
_Noreturn static void finish(int code, const char *message) {
    shared->exit_code = code;
    shared->workload = WORKLOAD_EXITED;
    tell_agent();
    dprintf(console, "STILLFRAME-EXIT nonce=%s code=%d message=\"%s\"\n", nonce(), code, message);
    if (agent > 0) /* stopped last, so that the host hears of the end */
        usleep(20000);
    kill(-1, SIGTERM);
    for (int64_t until = now_ms() + 300; now_ms() < until && waitpid(-1, NULL, WNOHANG) >= 0;)
        usleep(5000);
    kill(-1, SIGKILL);
    tcdrain(console);
    power_off();
}

static void workload_ended(int status) {
    char message[64] = "";
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    if (WIFSIGNALED(status))
        snprintf(message, sizeof message, "killed by signal %d", WTERMSIG(status));
    finish(code, message);
}

static void reap(void) {
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        if (pid == workload)
            workload_ended(status);
        if (pid == agent) {
            usleep(100000); /* a broken agent must not become a busy loop */
            start_agent();
        }
    }
}

static void control_message(void) {
    struct control_message message;
    if (recv(control, &message, sizeof message, MSG_DONTWAIT) != sizeof message)
        return;
    if (message.kind != SHUTDOWN_REQUESTED || kill_at)
        return;
    kill_at = now_ms() + message.grace_ms;
    if (workload <= 0)
        finish(0, "");
    kill(workload, SIGTERM);
}

static void start_workload(void) {
    int error = 0;
    char step[32];
    dprintf(console, "STILLFRAME-PROGRAM-START nonce=%s\n", nonce());
    workload = workload_start(&config, console, &error, step, sizeof step);
    if (error) {
        char message[96];
        snprintf(message, sizeof message, "cannot start: %s%s", strerror(error), step);
        finish(error == ENOENT && !*step ? 127 : 126, message);
    }
    shared->workload = WORKLOAD_RUNNING;
    tell_agent();
}

_Noreturn static void watch(int signals) {
    struct pollfd fds[2] = {{.fd = signals, .events = POLLIN}, {.fd = control, .events = POLLIN}};
    for (;;) {
        int64_t left = kill_at ? kill_at - now_ms() : -1;
        if (kill_at && left <= 0 && workload > 0)
            kill(workload, SIGKILL);
        poll(fds, 2, kill_at ? (left > 0 ? (int)left : 100) : -1);
        struct signalfd_siginfo info;
        while (read(signals, &info, sizeof info) > 0)
            ;
        reap();
        if (fds[1].revents & POLLIN)
            control_message();
    }
}

int main(void) {
    if (getpid() != 1) {
        fprintf(stderr, "this program is the init of a Stillframe guest\n");
        return 64;
    }
    boot_mount_early();
    boot_load_modules();
    boot_read_config(&config);
    boot_enter_root();
    console = boot_open_console();
    boot_identity(&config);
    network_configure(&config);

    int pair[2];
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        boot_failed("no memory for the agent");
    control = pair[0];
    agent_control = pair[1];
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGCHLD);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    int signals = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
    start_agent();
    start_workload();
    watch(signals);
}
