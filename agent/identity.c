/* IDENTIFY: a fork or restore becomes a guest of its own. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

enum { CLOCK_TOLERANCE_NS = 20000000 };

static int set_clock(const char *text) {
    struct timespec now, wanted;
    long long target = strtoll(text, NULL, 10);
    if (target <= 0)
        return 0;
    clock_gettime(CLOCK_REALTIME, &now);
    long long off = target - ((long long)now.tv_sec * 1000000000 + now.tv_nsec);
    if (off <= CLOCK_TOLERANCE_NS && off >= -CLOCK_TOLERANCE_NS)
        return 0;
    wanted.tv_sec = (time_t)(target / 1000000000);
    wanted.tv_nsec = (long)(target % 1000000000);
    return clock_settime(CLOCK_REALTIME, &wanted) ? errno : 0;
}

/* Our own line of /etc/hosts follows the name; whatever else is in there is the guest's. */
static void rename_in_hosts(const char *old, const char *name) {
    char text[16384], line[100], out[16600];
    ssize_t size = read_file("/etc/hosts", text, sizeof text);
    int length = snprintf(line, sizeof line, "127.0.1.1\t%.64s\n", old);
    char *at = size > 0 && size < (ssize_t)sizeof text - 1 ? strstr(text, line) : NULL;
    if (!at)
        return;
    int whole = snprintf(out, sizeof out, "%.*s127.0.1.1\t%.64s\n%s", (int)(at - text), text, name, at + length);
    write_file("/etc/hosts", out, (size_t)whole, 0644);
}

static int set_hostname(const char *name) {
    char old[65] = "", text[80];
    gethostname(old, sizeof old - 1);
    if (!*name || !strcmp(name, old))
        return 0;
    if (sethostname(name, strnlen(name, 64)))
        return errno;
    int size = snprintf(text, sizeof text, "%.64s\n", name);
    write_file("/etc/hostname", text, (size_t)size, 0644);
    rename_in_hosts(old, name);
    return 0;
}

static int set_machine_id(const char *id) {
    char text[40];
    if (strlen(id) != 32)
        return *id ? EINVAL : 0;
    int size = snprintf(text, sizeof text, "%s\n", id);
    int error = -write_file("/etc/machine-id", text, (size_t)size, 0444);
    if (error != EROFS)
        return error;
    error = -write_file("/run/machine-id", text, (size_t)size, 0444);
    if (!error && mount("/run/machine-id", "/etc/machine-id", NULL, MS_BIND, NULL))
        error = errno;
    return error;
}

void identify(struct agent *a, uint32_t id, const struct text_list *request) {
    uint8_t seed[64];
    struct text_builder text = {.size = 0};
    int size = hex_decode(text_list_get(request, "seed", ""), seed, sizeof seed);
    if (size < 32) /* less would leave forks guessable */
        return send_error(a, id, EINVAL, "seed");
    const char *stage = "seed";
    int error = -credit_entropy(seed, (size_t)size);
    explicit_bzero(seed, sizeof seed);
    if (!error && (error = set_clock(text_list_get(request, "time_ns", "0"))))
        stage = "clock";
    if (!error && (error = set_hostname(text_list_get(request, "hostname", ""))))
        stage = "hostname";
    if (!error && (error = set_machine_id(text_list_get(request, "machine_id", ""))))
        stage = "machine_id";
    if (!error && (error = -write_file("/run/stillframe-instance-id", text_list_get(request, "instance_id", ""),
                                       strlen(text_list_get(request, "instance_id", "")), 0644)))
        stage = "instance_id";
    if (error)
        return send_error(a, id, error, stage);
    state_text(a, &text);
    send_text(a, OK, id, &text);
}
