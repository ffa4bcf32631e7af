/*
 * A guest program that makes stale or torn pages visible.
 *
 *   pattern write FILE MIB THREADS   rewrites memory for ever, page after page, round after round
 *   pattern check FILE               halts the writers between two pages, checks all of it, lets them go on
 *
 * Each thread owns a stretch of the file (in /dev/shm, so in guest memory) and writes it from front to back;
 * every word of a page follows from the page's number and the round. So behind a thread's position all pages
 * must be of its round, and before it of the round before: one page that a copy of memory missed, or took from
 * another moment, is found.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE 4096
#define WORDS (PAGE / sizeof(uint64_t))
#define MOST_THREADS 16

struct thread {
    uint64_t first, pages;
    _Atomic uint64_t round, position; /* the page to be written next, in this round */
    _Atomic int halted;
};

struct head {
    uint64_t count;
    _Atomic int halt;
    struct thread threads[MOST_THREADS];
};

static struct head *head;
static uint64_t *memory;

static uint64_t word(uint64_t page, uint64_t round, uint64_t index)
{
    uint64_t mixed = page * 0x9e3779b97f4a7c15ull + round * 0xbf58476d1ce4e5b9ull + index;
    return mixed ^ mixed >> 29;
}

static void *write_for_ever(void *argument)
{
    struct thread *thread = argument;
    for (;;) {
        while (atomic_load(&head->halt)) {
            atomic_store(&thread->halted, 1);
            usleep(1000);
        }
        atomic_store(&thread->halted, 0);
        if (atomic_load(&head->halt))
            continue;
        uint64_t page = thread->first + thread->position;
        for (uint64_t index = 0; index < WORDS; index++)
            memory[page * WORDS + index] = word(page, thread->round, index);
        if (thread->position + 1 == thread->pages) {
            thread->round++;
            thread->position = 0;
        } else {
            thread->position++;
        }
    }
    return NULL;
}

static void map(const char *path, size_t bytes)
{
    int fd = open(path, O_RDWR | O_CREAT, 0600);
    struct stat status;
    if (fd < 0 || (bytes && ftruncate(fd, PAGE + bytes)) || fstat(fd, &status)) {
        perror(path);
        exit(2);
    }
    void *mapped = mmap(NULL, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) {
        perror("mmap");
        exit(2);
    }
    head = mapped;
    memory = (uint64_t *)((char *)mapped + PAGE);
}

static int write_all(const char *path, uint64_t mib, uint64_t count)
{
    pthread_t ids[MOST_THREADS];
    uint64_t share = mib * 256 / count;
    map(path, count * share * PAGE);
    for (uint64_t i = 0; i < count; i++) {
        head->threads[i].first = i * share;
        head->threads[i].pages = share;
    }
    atomic_store(&head->count, count);
    for (uint64_t i = 0; i < count; i++)
        if (pthread_create(&ids[i], NULL, write_for_ever, &head->threads[i]))
            return 2;
    pthread_join(ids[0], NULL);
    return 0;
}

static int check_thread(const struct thread *thread)
{
    for (uint64_t i = 0; i < thread->pages; i++) {
        uint64_t page = thread->first + i;
        uint64_t round = i < thread->position ? thread->round : thread->round - 1;
        for (uint64_t index = 0; index < WORDS; index++) {
            uint64_t wanted = thread->round == 0 && i >= thread->position ? 0 : word(page, round, index);
            if (memory[page * WORDS + index] != wanted) {
                printf("BAD page %llu word %llu, round %llu position %llu\n", (unsigned long long)page,
                       (unsigned long long)index, (unsigned long long)thread->round,
                       (unsigned long long)thread->position);
                return 1;
            }
        }
    }
    return 0;
}

static int check_all(const char *path)
{
    int bad = 0;
    uint64_t pages = 0;
    map(path, 0);
    atomic_store(&head->halt, 1);
    for (uint64_t i = 0; i < head->count; i++)
        while (!atomic_load(&head->threads[i].halted))
            usleep(1000);
    for (uint64_t i = 0; i < head->count && !bad; i++) {
        bad = check_thread(&head->threads[i]);
        pages += head->threads[i].round * head->threads[i].pages + head->threads[i].position;
    }
    if (!bad)
        printf("good %llu\n", (unsigned long long)pages);
    atomic_store(&head->halt, 0);
    return bad;
}

int main(int count, char **arguments)
{
    if (count == 5 && !strcmp(arguments[1], "write") && atoi(arguments[4]) <= MOST_THREADS)
        return write_all(arguments[2], strtoull(arguments[3], NULL, 10), strtoull(arguments[4], NULL, 10));
    if (count == 3 && !strcmp(arguments[1], "check"))
        return check_all(arguments[2]);
    fprintf(stderr, "usage: pattern write FILE MIB THREADS | pattern check FILE\n");
    return 2;
}
