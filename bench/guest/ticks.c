/* Ticks against a clock that goes on while the guest stands still.

       ticks TOKEN ADDRESS PORT      (goes to the background once the first answer came)

   A guest's own clocks stop with its processors, so it cannot see by them that it stood still. This
   program sends a small UDP datagram about every millisecond to the host, which answers with its own
   CLOCK_MONOTONIC. The largest gap between two answers, by that clock, is what the guest missed. It
   sends on whether or not an answer came: QEMU drops what is on its way when it stops a guest, and
   waiting for such an answer would look like a longer pause. The host also says which window the
   moment belongs to; when that number changes, the figures of the window that ended are sent until
   the host acknowledges them. See bench/echo.py for the other end.
   All numbers are little-endian, as on every machine this is built for. */
#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAGIC = 0x4b434954, BUCKETS = 12, PERIOD_NS = 1000 * 1000 };

/* Upper ends of the histogram's buckets in microseconds; the last bucket has none. */
static const uint32_t bucket_end_us[BUCKETS - 1] = {1000,  1500,  2000,   3000,   5000,   10000,
                                                    20000, 50000, 100000, 200000, 500000};

struct figures {
    uint32_t window, count, lost, buckets[BUCKETS];
    uint64_t largest_ns;
};

struct question {
    uint32_t magic, token, sequence, has_figures;
    struct figures figures;
};

struct answer {
    uint32_t magic, sequence, window, acknowledged;
    uint64_t now_ns;
};

_Static_assert(sizeof(struct question) == 16 + 72, "layout known to bench/echo.py");
_Static_assert(sizeof(struct answer) == 24, "layout known to bench/echo.py");

static struct figures current, finished;
static uint64_t last_ns;
static uint32_t last_sequence;

static void count_gap(uint64_t gap) {
    int bucket = 0;
    while (bucket < BUCKETS - 1 && gap >= bucket_end_us[bucket] * 1000ull)
        bucket++;
    current.buckets[bucket]++;
    current.count++;
    if (gap > current.largest_ns)
        current.largest_ns = gap;
}

static void take(const struct answer *answer) {
    if (answer->acknowledged == finished.window)
        finished.window = 0;
    if (answer->window != current.window) {
        if (current.window)
            finished = current;
        memset(&current, 0, sizeof current);
        current.window = answer->window;
    }
    /* A gap belongs to the window in which it ended. */
    if (last_ns)
        count_gap(answer->now_ns - last_ns);
    current.lost += answer->sequence - last_sequence - 1;
    last_ns = answer->now_ns;
    last_sequence = answer->sequence;
}

static int64_t monotonic_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

/* One question, and whatever is answered until it is time for the next one. */
static void tick(int fd, uint32_t token, uint32_t sequence) {
    struct question question = {MAGIC, token, sequence, finished.window != 0, finished};
    struct answer answer;
    (void)!send(fd, &question, sizeof question, 0);
    /* Counted from here: however slow the guest is, it sleeps in between. */
    int64_t left, until = monotonic_ns() + PERIOD_NS;
    while ((left = until - monotonic_ns()) > 0) {
        struct pollfd ready = {.fd = fd, .events = POLLIN};
        if (ppoll(&ready, 1, &(struct timespec){.tv_nsec = left}, NULL) > 0 &&
            recv(fd, &answer, sizeof answer, 0) == sizeof answer && answer.magic == MAGIC &&
            answer.sequence - last_sequence - 1 < UINT32_MAX / 2)
            take(&answer);
    }
}

static void to_background(void) {
    if (fork() > 0)
        _exit(0);
    setsid();
    int null = open("/dev/null", O_RDWR);
    for (int fd = 0; fd < 3; fd++)
        dup2(null, fd);
}

int main(int count, char **arguments) {
    if (count != 4) {
        fprintf(stderr, "usage: ticks TOKEN ADDRESS PORT\n");
        return 2;
    }
    uint32_t token = (uint32_t)strtoul(arguments[1], NULL, 10);
    struct sockaddr_in host = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(arguments[3]))};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (inet_pton(AF_INET, arguments[2], &host.sin_addr) != 1 ||
        connect(fd, (struct sockaddr *)&host, sizeof host)) {
        perror("ticks: connect");
        return 1;
    }
    /* Before everything else in the guest: what is measured is the host's doing. */
    struct sched_param priority = {.sched_priority = 50};
    sched_setscheduler(0, SCHED_FIFO, &priority);
    prctl(PR_SET_TIMERSLACK, 1ul);
    uint32_t sequence = 0;
    while (!last_sequence)
        tick(fd, token, ++sequence);
    to_background();
    for (;;)
        tick(fd, token, ++sequence);
}
