/* Memory with known content, and a writer that changes it at a known rate.

       dirty SIZE RATE          fill SIZE MiB, then rewrite RATE MiB/s of it in the background
       dirty ask status         pages filled, pages rewritten so far, milliseconds since the fill
       dirty ask rewrite=N      rewrite N MiB at once, then as status
       dirty ask verify         compare every page with what it must be; fails if one differs

   Pages are rewritten in a cycle, one after another, whole, with non-zero words that depend on the
   page and on how often it was written. So one counter tells what all of the memory must be.
   DIRTY_PORT is the port on the loopback device by which it is asked (4974). */
#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, PAGES_PER_MIB = 256, STEP_MS = 10 };

static uint64_t (*memory)[WORDS];
static uint64_t pages, written; /* written: since the fill */

static uint64_t seed(uint64_t page, uint64_t generation) {
    return (page + 1) * 0x9e3779b97f4a7c15ull ^ (generation + 1) * 0xc2b2ae3d27d4eb4full;
}

static void write_page(uint64_t page, uint64_t generation) {
    uint64_t value = seed(page, generation);
    for (int word = 0; word < WORDS; word++, value += 0x165667b19e3779f9ull)
        memory[page][word] = value | 1;
}

static void rewrite(uint64_t count) {
    for (; count; count--, written++)
        write_page(written % pages, written / pages + 1);
}

static int64_t first_bad_page(void) {
    for (uint64_t page = 0; page < pages; page++) {
        uint64_t generation = written / pages + (page < written % pages);
        uint64_t value = seed(page, generation);
        for (int word = 0; word < WORDS; word++, value += 0x165667b19e3779f9ull)
            if (memory[page][word] != (value | 1))
                return (int64_t)page;
    }
    return -1;
}

static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000ll + now.tv_nsec / 1000000;
}

static void answer(int fd, int64_t filled_at) {
    char text[64], reply[128];
    struct sockaddr_in from;
    socklen_t size = sizeof from;
    ssize_t length = recvfrom(fd, text, sizeof text - 1, 0, (struct sockaddr *)&from, &size);
    if (length < 0)
        return;
    text[length] = 0;
    int64_t bad = -1;
    if (!strncmp(text, "rewrite=", 8))
        rewrite(strtoull(text + 8, NULL, 10) * PAGES_PER_MIB);
    else if (!strcmp(text, "verify"))
        bad = first_bad_page();
    snprintf(reply, sizeof reply, "%s pages=%llu written=%llu ms=%lld", bad < 0 ? "good" : "BAD",
             (unsigned long long)pages, (unsigned long long)written, (long long)(now_ms() - filled_at));
    sendto(fd, reply, strlen(reply), 0, (struct sockaddr *)&from, size);
}

_Noreturn static void serve(int fd, uint64_t rate) {
    int64_t filled_at = now_ms(), last = filled_at;
    uint64_t owed = 0; /* thousandths of a page */
    for (;;) {
        struct pollfd ready = {.fd = fd, .events = POLLIN};
        if (poll(&ready, 1, rate ? STEP_MS : -1) > 0)
            answer(fd, filled_at);
        int64_t now = now_ms();
        owed += rate * PAGES_PER_MIB * (uint64_t)(now - last);
        last = now;
        /* Never more than half a second's worth at once: the rate is a limit, not a debt. */
        if (owed > rate * PAGES_PER_MIB * 500)
            owed = rate * PAGES_PER_MIB * 500;
        rewrite(owed / 1000);
        owed %= 1000;
    }
}

static int local_socket(struct sockaddr_in *address) {
    const char *port = getenv("DIRTY_PORT");
    *address = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port ? (uint16_t)atoi(port) : 4974)};
    address->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
}

static int ask(const char *question) {
    struct sockaddr_in address;
    char reply[128] = "";
    int fd = local_socket(&address);
    struct timeval limit = {.tv_sec = 60};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) ||
        send(fd, question, strlen(question), 0) < 0 || recv(fd, reply, sizeof reply - 1, 0) < 0) {
        perror("dirty: ask");
        return 1;
    }
    puts(reply);
    return strncmp(reply, "good", 4) != 0;
}

int main(int count, char **arguments) {
    if (count == 3 && !strcmp(arguments[1], "ask"))
        return ask(arguments[2]);
    if (count != 3 || !(pages = strtoull(arguments[1], NULL, 10) * PAGES_PER_MIB)) {
        fprintf(stderr, "usage: dirty SIZE RATE | dirty ask status|rewrite=N|verify\n");
        return 2;
    }
    struct sockaddr_in address;
    int fd = local_socket(&address);
    memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || bind(fd, (struct sockaddr *)&address, sizeof address)) {
        perror("dirty");
        return 1;
    }
    /* Fork first: filled before, every page would be copied again when the child writes it. */
    int filled[2];
    char byte = 1;
    if (pipe(filled))
        return 1;
    if (fork() > 0) {
        close(filled[1]);
        return read(filled[0], &byte, 1) == 1 ? 0 : 1;
    }
    setsid();
    close(filled[0]);
    for (uint64_t page = 0; page < pages; page++)
        write_page(page, 0);
    if (write(filled[1], &byte, 1) != 1)
        return 1;
    close(filled[1]);
    int null = open("/dev/null", O_RDWR);
    for (int stream = 0; stream < 3; stream++)
        dup2(null, stream);
    serve(fd, strtoull(arguments[2], NULL, 10));
}
