/*
 * Preloaded into a server under test: fails, or kills it at, the Nth call that changes its data.
 *
 * STILLFRAME_INJECT names a file that is mapped as `struct plan`; the test arms it there. Calls on
 * paths below STILLFRAME_INJECT_BELOW count. Where a kill is planned, what is said to VMMs and
 * clients counts as well, so that every step between two changes is reached too.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define FICLONE_REQUEST 0x40049409UL

/* What a call does; a plan has the mask of those that count. */
enum { ALLOCATES = 1, WRITES = 2, SYNCS = 4, REMOVES = 8, TALKS = 16 };

struct plan {
    _Atomic uint32_t armed;
    uint32_t mask;
    int32_t error; /* errno, or 0 for SIGKILL */
    uint32_t first;
    uint32_t last;
    uint32_t deadly; /* so many calls of any kind after the one that failed, one kills; 0: none */
    _Atomic uint32_t calls;
    _Atomic uint32_t fired;
    _Atomic uint32_t since;
    char only[128]; /* a pattern of fnmatch(3) for call and path; empty: all count */
    char where[232];
};

static struct plan *plan;
static char below[PATH_MAX];

__attribute__((constructor)) static void prepare(void)
{
    const char *path = getenv("STILLFRAME_INJECT"), *wanted = getenv("STILLFRAME_INJECT_BELOW");
    int fd;

    if (!path || !wanted || (fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC)) < 0)
        return;
    snprintf(below, sizeof below, "%s", wanted);
    void *mapped = mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped != MAP_FAILED)
        plan = mapped;
}

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

/* Count the call; non-zero (with errno set) when it is to fail. */
static int strike(const char *call, const char *path)
{
    char where[sizeof plan->where];
    uint32_t number;

    if (plan->deadly && atomic_load(&plan->fired) && atomic_fetch_add(&plan->since, 1) + 1 >= plan->deadly)
        die();
    snprintf(where, sizeof where, "%s %s", call, path);
    if (plan->only[0] && fnmatch(plan->only, where, 0) != 0)
        return 0;
    number = atomic_fetch_add(&plan->calls, 1) + 1;
    if (number < plan->first || number > plan->last)
        return 0;
    if (atomic_fetch_add(&plan->fired, 1) == 0)
        memcpy(plan->where, where, sizeof where);
    if (plan->error == 0)
        die();
    errno = plan->error;
    return 1;
}

static int counts(int kind)
{
    if (!plan || !atomic_load(&plan->armed))
        return 0;
    return (plan->mask & (uint32_t)kind) || (plan->deadly && atomic_load(&plan->fired));
}

static int ours(const char *path)
{
    size_t length = strlen(below);
    return strncmp(path, below, length) == 0 && path[length] == '/';
}

static const char *resolved(int dirfd, const char *path, char *buffer, size_t size)
{
    char link[64];
    ssize_t length;

    if (path[0] == '/')
        return path;
    snprintf(link, sizeof link, dirfd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dirfd);
    length = readlink(link, buffer, size - 1);
    if (length < 0)
        return "";
    snprintf(buffer + length, size - (size_t)length, "/%s", path);
    return buffer;
}

static int fails_at(int kind, const char *call, int dirfd, const char *path)
{
    char buffer[PATH_MAX + 256];

    if (!counts(kind) || !path)
        return 0;
    path = resolved(dirfd, path, buffer, sizeof buffer);
    return ours(path) && strike(call, path);
}

static int fails(int kind, const char *call, int fd)
{
    char link[64], buffer[PATH_MAX];
    ssize_t length;

    if (!counts(kind))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, buffer, sizeof buffer - 1);
    if (length < 0)
        return 0;
    buffer[length] = 0;
    return ours(buffer) && strike(call, buffer);
}

/* A peer with an address is a VMM or a client; the event loop's own socket pair has none. */
static void talks(int fd)
{
    struct sockaddr_storage peer;
    socklen_t length = sizeof peer;

    if (counts(TALKS) && getpeername(fd, (struct sockaddr *)&peer, &length) == 0 &&
        (peer.ss_family != AF_UNIX || length > sizeof(sa_family_t)))
        strike("send", peer.ss_family == AF_UNIX ? "to a VMM" : "to a client");
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CREATES(flags) (((flags) & O_CREAT) != 0)

#define OPEN(name)                                                                   \
    int name(const char *path, int flags, ...)                                       \
    {                                                                                \
        va_list arguments;                                                           \
        va_start(arguments, flags);                                                  \
        mode_t mode = va_arg(arguments, mode_t);                                     \
        va_end(arguments);                                                           \
        if (CREATES(flags) && fails_at(ALLOCATES, "create", AT_FDCWD, path))         \
            return -1;                                                               \
        return NEXT(name)(path, flags, mode);                                        \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                 \
    int name(int dirfd, const char *path, int flags, ...)                            \
    {                                                                                \
        va_list arguments;                                                           \
        va_start(arguments, flags);                                                  \
        mode_t mode = va_arg(arguments, mode_t);                                     \
        va_end(arguments);                                                           \
        if (CREATES(flags) && fails_at(ALLOCATES, "create", dirfd, path))            \
            return -1;                                                               \
        return NEXT(name)(dirfd, path, flags, mode);                                 \
    }
OPENAT(openat)
OPENAT(openat64)

/* Calls on an open file. */
#define ON_FD(kind, result, name, parameters, arguments)                             \
    result name parameters                                                           \
    {                                                                                \
        if (fails(kind, #name, fd))                                                  \
            return -1;                                                               \
        return NEXT(name) arguments;                                                 \
    }
ON_FD(WRITES, ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
ON_FD(WRITES, ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
ON_FD(WRITES, ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
ON_FD(WRITES, ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
ON_FD(WRITES, ssize_t, pwritev, (int fd, const struct iovec *parts, int count, off_t at), (fd, parts, count, at))
ON_FD(WRITES, ssize_t, pwritev64, (int fd, const struct iovec *parts, int count, off64_t at), (fd, parts, count, at))
ON_FD(WRITES, ssize_t, pwritev2, (int fd, const struct iovec *parts, int count, off_t at, int flags), (fd, parts, count, at, flags))
ON_FD(WRITES, ssize_t, pwritev64v2, (int fd, const struct iovec *parts, int count, off64_t at, int flags), (fd, parts, count, at, flags))
ON_FD(WRITES, ssize_t, sendfile, (int fd, int from, off_t *at, size_t size), (fd, from, at, size))
ON_FD(WRITES, ssize_t, sendfile64, (int fd, int from, off64_t *at, size_t size), (fd, from, at, size))
ON_FD(WRITES, int, ftruncate, (int fd, off_t size), (fd, size))
ON_FD(WRITES, int, ftruncate64, (int fd, off64_t size), (fd, size))
ON_FD(WRITES, int, fallocate, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size))
ON_FD(WRITES, int, fallocate64, (int fd, int mode, off64_t at, off64_t size), (fd, mode, at, size))
ON_FD(SYNCS, int, fsync, (int fd), (fd))
ON_FD(SYNCS, int, fdatasync, (int fd), (fd))

ssize_t copy_file_range(int from, off64_t *from_at, int fd, off64_t *at, size_t size, unsigned flags)
{
    if (fails(WRITES, "copy_file_range", fd))
        return -1;
    return NEXT(copy_file_range)(from, from_at, fd, at, size, flags);
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (request == FICLONE_REQUEST && fails(WRITES, "clone", fd))
        return -1;
    return NEXT(ioctl)(fd, request, argument);
}

/* Calls on names. */
#define ON_PATH(kind, call, name, dirfd, path, parameters, arguments)                \
    int name parameters                                                              \
    {                                                                                \
        if (fails_at(kind, call, dirfd, path))                                       \
            return -1;                                                               \
        return NEXT(name) arguments;                                                 \
    }
ON_PATH(ALLOCATES, "mkdir", mkdir, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
ON_PATH(ALLOCATES, "mkdir", mkdirat, fd, path, (int fd, const char *path, mode_t mode), (fd, path, mode))
ON_PATH(ALLOCATES, "rename", rename, AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(ALLOCATES, "rename", renameat, at, to, (int fd, const char *from, int at, const char *to), (fd, from, at, to))
/* Swapping names needs no space (RENAME_EXCHANGE): it only counts as a moment to be killed at. */
ON_PATH(REMOVES, "exchange", renameat2, at, to, (int fd, const char *from, int at, const char *to, unsigned flags), (fd, from, at, to, flags))
ON_PATH(ALLOCATES, "link", link, AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(ALLOCATES, "link", linkat, at, to, (int fd, const char *from, int at, const char *to, int flags), (fd, from, at, to, flags))
ON_PATH(ALLOCATES, "truncate", truncate, AT_FDCWD, path, (const char *path, off_t size), (path, size))
ON_PATH(ALLOCATES, "truncate", truncate64, AT_FDCWD, path, (const char *path, off64_t size), (path, size))
ON_PATH(REMOVES, "unlink", unlink, AT_FDCWD, path, (const char *path), (path))
ON_PATH(REMOVES, "unlink", unlinkat, fd, path, (int fd, const char *path, int flags), (fd, path, flags))
ON_PATH(REMOVES, "rmdir", rmdir, AT_FDCWD, path, (const char *path), (path))

ssize_t send(int fd, const void *data, size_t size, int flags)
{
    talks(fd);
    return NEXT(send)(fd, data, size, flags);
}

int connect(int fd, const struct sockaddr *address, socklen_t length)
{
    if (address->sa_family == AF_UNIX && counts(TALKS))
        strike("connect", "to a VMM");
    return NEXT(connect)(fd, address, length);
}
