/*
 * Preloaded into a VMM: asks the kernel to track writes to the guest's memory.
 *
 * The server copies guest memory from outside while the guest runs, and must then know which pages
 * were written meanwhile. The kernel can tell, exactly and at no cost until it is asked
 * (userfaultfd's UFFD_FEATURE_WP_ASYNC with PAGEMAP_SCAN, Linux 6.7,
 * Documentation/admin-guide/mm/pagemap.rst), but only a process itself can enable that for a
 * mapping of its own. So this library looks at each mmap of the VMM, and enables it for the private
 * mapping of the one file that STILLFRAME_MEMORY=<device>:<inode> names.
 *
 * Whatever fails here fails silently: the server finds memory that is not tracked, and copies all of
 * it during the pause instead.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* linux/userfaultfd.h of Linux 6.7; older headers lack them. */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif

static int is_guest_memory(int fd)
{
    const char *wanted = getenv("STILLFRAME_MEMORY");
    struct stat status;
    char *rest;

    if (wanted == NULL || syscall(SYS_fstat, fd, &status) != 0)
        return 0;
    if (strtoull(wanted, &rest, 10) != status.st_dev || *rest != ':')
        return 0;
    return strtoull(rest + 1, NULL, 10) == status.st_ino;
}

static void track(void *start, size_t length)
{
    /* Faults are resolved by the kernel itself, so the unprivileged kind of descriptor is enough. */
    int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_WP_ASYNC};
    struct uffdio_register range = {
        .range = {.start = (uintptr_t)start, .len = length},
        .mode = UFFDIO_REGISTER_MODE_WP,
    };

    if (uffd < 0)
        return;
    /* On success the descriptor stays open for the life of the VMM: closing it ends the tracking. */
    if (ioctl(uffd, UFFDIO_API, &api) != 0 || ioctl(uffd, UFFDIO_REGISTER, &range) != 0)
        close(uffd);
}

__attribute__((visibility("default"))) void *mmap64(void *address, size_t length, int protection, int flags, int fd, off64_t offset)
{
    void *mapped = (void *)syscall(SYS_mmap, address, length, protection, flags, fd, offset);
    int kept = errno;

    if (mapped != MAP_FAILED && fd >= 0 && (flags & MAP_TYPE) == MAP_PRIVATE && is_guest_memory(fd))
        track(mapped, length);
    errno = kept;
    return mapped;
}

__attribute__((visibility("default"))) void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    return mmap64(address, length, protection, flags, fd, offset);
}

/*
 * Where Yama restricts ptrace (kernel.yama.ptrace_scope=1), only a parent may read a VMM's memory. A
 * VMM outlives its server and is adopted by the next, so it lets its own user's processes do so.
 */
__attribute__((constructor)) static void allow_adoption(void)
{
    if (getenv("STILLFRAME_MEMORY") != NULL)
        prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
}
