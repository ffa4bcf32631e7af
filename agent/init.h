/* PID 1: boots the guest, starts agent and workload, reaps, powers off. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "util.h"

/* The third disk. `list` points into memory that lives as long as the process. */
struct config {
    struct text_list list;
    bool vsock;
};

/* Shared by init and agent (one mapping over fork). */
struct shared {
    volatile int workload; /* enum workload_state */
    volatile int exit_code;
};
enum workload_state { WORKLOAD_STARTING, WORKLOAD_RUNNING, WORKLOAD_EXITED };

/* Messages between init and agent, on a SOCK_SEQPACKET pair. */
struct control_message {
    enum { WORKLOAD_CHANGED = 1, SHUTDOWN_REQUESTED } kind;
    int grace_ms;
};

/* boot.c; each ends in boot_failed when it cannot do its part. */
_Noreturn void boot_failed(const char *what);
void boot_mount_early(void);
void boot_load_modules(void);
void boot_read_config(struct config *config);
void boot_enter_root(void);
void boot_identity(const struct config *config);
int boot_open_console(void);
_Noreturn void power_off(void);

/* network.c; a failure is printed, not fatal. */
void network_configure(const struct config *config);

/* workload.c */
pid_t workload_start(const struct config *config, int console, int *error, char *step, size_t size);
/* The environment of the workload, with PATH and HOME filled in; `extra` free slots. Free the array only. */
char **workload_environment(const struct config *config, const struct account *account, size_t extra);
void process_defaults(void); /* in a child: default signals, no mask, own session, ordinary OOM score */
int become(const struct account *account); /* 0 or -errno */

_Noreturn void agent_main(const struct config *config, struct shared *shared, int control, int console);
