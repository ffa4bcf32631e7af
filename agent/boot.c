/* From the kernel's hand-over to a mounted root. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

#include "init.h"

#define CONFIG_MAGIC "STILLFRAME-CFG1\n"

_Noreturn void power_off(void) {
    sync();
    /* Best effort: leave the overlay disk clean, so that the next boot need not replay its journal. */
    mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
    sync();
    write_file("/proc/sys/kernel/printk", "0", 1, 0); /* "reboot: Power down" is no line of the workload's log */
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}

_Noreturn void boot_failed(const char *what) {
    int fd = open("/dev/console", O_WRONLY | O_NOCTTY);
    dprintf(fd < 0 ? 2 : fd, "stillframe-init: %s: %s\n", what, strerror(errno));
    tcdrain(fd);
    power_off();
}

static void mount_kernel(const char *type, const char *target, const char *options, unsigned long flags) {
    mkdir(target, 0755);
    if (mount(type, target, type, flags, options) && errno != EBUSY)
        boot_failed(target);
}

void boot_mount_early(void) {
    umask(0);
    mount_kernel("devtmpfs", "/dev", "mode=0755", MS_NOSUID);
    mount_kernel("proc", "/proc", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC);
    mount_kernel("sysfs", "/sys", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC);
}

/* The initrd is memory, and memory is what a snapshot stores. */
static void drop_module(const char *name) {
    char path[256];
    snprintf(path, sizeof path, "/modules/%s", name);
    unlink(path);
}

static void load_module(const char *name) {
    char path[256];
    snprintf(path, sizeof path, "/modules/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        boot_failed(path);
    if (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST && errno != ENODEV)
        fprintf(stderr, "stillframe-init: %s: %s\n", name, strerror(errno));
    close(fd);
    drop_module(name);
}

/* Whether the host reaches the agent over vsock; the kernel command line says so. */
static bool agent_on_vsock(void) {
    char command_line[4096] = "";
    read_file("/proc/cmdline", command_line, sizeof command_line);
    return strstr(command_line, "stillframe.agent=vsock") != NULL;
}

void boot_load_modules(void) {
    char order[8192], *rest = order;
    if (read_file("/modules/order", order, sizeof order) < 0)
        boot_failed("/modules/order");
    bool vsock = agent_on_vsock();
    for (char *name; (name = strsep(&rest, "\n"));)
        if (*name && (vsock || !strstr(name, "vsock")))
            load_module(name);
        else if (*name)
            drop_module(name);
    unlink("/modules/order");
}

/* The disks, as the host numbers them. */
enum { ROOT_DISK, OVERLAY_DISK, CONFIG_DISK, DISKS };

/*
 * Where a disk is. Not every machine finds its disks in their order, so hosts that can, tell the number as a serial
 * number (virtio-blk); elsewhere the order must do.
 */
static const char *disk(int number) {
    static char path[DISKS][sizeof "/dev/vda"];
    char name[64], serial[64], wanted[32];
    snprintf(wanted, sizeof wanted, "stillframe%d", number);
    snprintf(path[number], sizeof path[number], "/dev/vd%c", 'a' + number);
    for (char letter = 'a'; letter <= 'z'; letter++) {
        snprintf(name, sizeof name, "/sys/block/vd%c/serial", letter);
        if (read_file(name, serial, sizeof serial) < 0)
            continue;
        serial[strcspn(serial, "\n")] = 0;
        if (!strcmp(serial, wanted))
            path[number][sizeof "/dev/vd" - 1] = letter;
    }
    return path[number];
}

void boot_read_config(struct config *config) {
    uint8_t head[20];
    int fd = open(disk(CONFIG_DISK), O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, head, sizeof head) != sizeof head)
        boot_failed("config disk");
    uint32_t size = head[16] | head[17] << 8 | head[18] << 16 | (uint32_t)head[19] << 24;
    errno = EPROTO;
    if (memcmp(head, CONFIG_MAGIC, 16) || size > 1 << 20)
        boot_failed("config disk is not ours");
    char *data = must(malloc(size + 1));
    for (size_t have = 0; have < size;) {
        ssize_t count = read(fd, data + have, size - have);
        if (count <= 0)
            boot_failed("config disk is cut off");
        have += (size_t)count;
    }
    close(fd);
    if (!text_list_open(&config->list, data, size))
        boot_failed("config disk is damaged");
    uint8_t seed[64];
    int seeded = hex_decode(text_list_get(&config->list, "seed", ""), seed, sizeof seed);
    if (seeded > 0)
        credit_entropy(seed, (size_t)seeded);
    config->vsock = agent_on_vsock();
}

static void mount_root(void) {
    mkdir("/lower", 0755);
    mkdir("/over", 0755);
    mkdir("/root", 0755);
    if (mount(disk(ROOT_DISK), "/lower", "squashfs", MS_RDONLY, NULL))
        boot_failed("root image");
    /* The disk is new and zero: to zero its inode tables would store a hundred megabytes of nothing. */
    if (mount(disk(OVERLAY_DISK), "/over", "ext4", MS_NOATIME, "noinit_itable"))
        boot_failed("overlay disk");
    mkdir("/over/upper", 0755);
    mkdir("/over/work", 0755);
    if (mount("overlay", "/root", "overlay", 0, "lowerdir=/lower,upperdir=/over/upper,workdir=/over/work"))
        boot_failed("overlay root");
}

/* Moves a mount into the new root, whose image may lack the directory. */
static void move_mount_into(const char *name) {
    char target[64];
    snprintf(target, sizeof target, "/root%s", name);
    mkdir(target, 0755);
    if (mount(name, target, NULL, MS_MOVE, NULL))
        boot_failed(target);
}

static void mount_temporary(const char *target, const char *options) {
    mkdir(target, 0755);
    mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, options);
}

void boot_enter_root(void) {
    mount_root();
    move_mount_into("/dev");
    move_mount_into("/proc");
    move_mount_into("/sys");
    unlink("/init"); /* still mapped; its pages go when nothing uses them */
    if (chdir("/root") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
        boot_failed("entering the root");
    mkdir("/dev/pts", 0755);
    mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666");
    mount_temporary("/dev/shm", "mode=1777");
    mount_temporary("/run", "mode=0755");
    mkdir("/tmp", 01777);
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    /* devtmpfs makes no links; programs expect these. */
    if (symlink("/proc/self/fd", "/dev/fd") || symlink("/proc/self/fd/0", "/dev/stdin") ||
        symlink("/proc/self/fd/1", "/dev/stdout") || symlink("/proc/self/fd/2", "/dev/stderr"))
        errno = 0;
}

int boot_open_console(void) {
    int fd = open("/dev/console", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        boot_failed("/dev/console");
    struct termios mode;
    if (!tcgetattr(fd, &mode)) { /* the log holds what the workload wrote: no CR added, nothing echoed */
        mode.c_oflag &= ~(tcflag_t)OPOST;
        mode.c_lflag &= ~(tcflag_t)(ECHO | ICANON | ISIG);
        tcsetattr(fd, TCSANOW, &mode);
    }
    dup2(fd, 2);
    return fd;
}

/* A symbolic link (systemd's resolv.conf) may lead nowhere in this guest: replace it. */
static void replace_file(const char *path, const char *text, size_t size) {
    struct stat info;
    if (!lstat(path, &info) && S_ISLNK(info.st_mode))
        unlink(path);
    write_file(path, text, size, 0644);
}

static void write_resolver(const struct config *config) {
    char text[1024];
    size_t size = 0;
    const char *key, *value;
    for (size_t at = 0; text_list_next(&config->list, &at, &key, &value);)
        if (!strcmp(key, "dns") && size + strlen(value) + 16 < sizeof text)
            size += (size_t)sprintf(text + size, "nameserver %s\n", value);
    if (size)
        replace_file("/etc/resolv.conf", text, size);
}

void boot_identity(const struct config *config) {
    char text[512];
    const char *hostname = text_list_get(&config->list, "hostname", "localhost");
    const char *machine_id = text_list_get(&config->list, "machine_id", "");
    mkdir("/etc", 0755);
    if (sethostname(hostname, strnlen(hostname, 64)))
        fprintf(stderr, "stillframe-init: host name %.64s: %s\n", hostname, strerror(errno));
    int size = snprintf(text, sizeof text, "%.64s\n", hostname);
    replace_file("/etc/hostname", text, (size_t)size);
    size = snprintf(text, sizeof text,
                    "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t%.64s\n", hostname);
    replace_file("/etc/hosts", text, (size_t)size);
    if (*machine_id) {
        size = snprintf(text, sizeof text, "%.32s\n", machine_id);
        replace_file("/etc/machine-id", text, (size_t)size);
    }
    write_resolver(config);
}
