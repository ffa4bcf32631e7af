#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* linux/random.h is not part of musl's headers. */
#define RNDADDENTROPY_NUMBER 0x40085203
#define RNDRESEEDCRNG_NUMBER 0x5207

bool text_list_open(struct text_list *list, const void *data, size_t size) {
    const char *text = data;
    size_t parts = 0;
    for (size_t i = 0; i < size; i++)
        parts += text[i] == 0;
    list->data = text;
    list->size = size;
    return size == 0 || (text[size - 1] == 0 && parts % 2 == 0);
}

bool text_list_next(const struct text_list *list, size_t *at, const char **key, const char **value) {
    if (*at >= list->size)
        return false;
    *key = list->data + *at;
    *value = *key + strlen(*key) + 1;
    *at = (size_t)(*value - list->data) + strlen(*value) + 1;
    return true;
}

const char *text_list_get(const struct text_list *list, const char *key, const char *fallback) {
    const char *k, *v;
    for (size_t at = 0; text_list_next(list, &at, &k, &v);)
        if (!strcmp(k, key))
            fallback = v;
    return fallback;
}

char **text_list_all(const struct text_list *list, const char *key, size_t extra) {
    const char *k, *v;
    size_t count = 0;
    for (size_t at = 0; text_list_next(list, &at, &k, &v);)
        count += !strcmp(k, key);
    char **all = must(calloc(count + extra + 1, sizeof *all));
    count = 0;
    for (size_t at = 0; text_list_next(list, &at, &k, &v);)
        if (!strcmp(k, key))
            all[count++] = (char *)v;
    return all;
}

void text_add(struct text_builder *b, const char *key, const char *value) {
    size_t k = strlen(key) + 1, v = strlen(value) + 1;
    if (b->size + k + v > sizeof b->data) {
        b->overflow = true;
        return;
    }
    memcpy(b->data + b->size, key, k);
    memcpy(b->data + b->size + k, value, v);
    b->size += k + v;
}

void text_addf(struct text_builder *b, const char *key, const char *format, ...) {
    char value[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(value, sizeof value, format, arguments);
    va_end(arguments);
    text_add(b, key, value);
}

void bytes_add(struct bytes *b, const void *data, size_t size) {
    if (b->start && b->start + b->size + size > b->capacity) {
        memmove(b->data, b->data + b->start, b->size);
        b->start = 0;
    }
    if (b->size + size > b->capacity) {
        b->capacity = (b->size + size) * 2;
        b->data = must(realloc(b->data, b->capacity));
    }
    memcpy(b->data + b->start + b->size, data, size);
    b->size += size;
}

void bytes_drop(struct bytes *b, size_t count) {
    b->start += count;
    b->size -= count;
    if (!b->size)
        b->start = 0;
}

void bytes_free(struct bytes *b) {
    free(b->data);
    *b = (struct bytes){0};
}

void *must(void *memory) {
    if (!memory)
        _exit(70);
    return memory;
}

int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

ssize_t read_file(const char *path, char *buffer, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    size_t have = 0;
    ssize_t count = 0;
    while (have < size - 1 && (count = read(fd, buffer + have, size - 1 - have)) > 0)
        have += (size_t)count;
    close(fd);
    buffer[have] = 0;
    return count < 0 ? -1 : (ssize_t)have;
}

int write_file(const char *path, const char *text, size_t size, int mode) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, mode);
    if (fd < 0)
        return -errno;
    ssize_t count = write(fd, text, size);
    int error = count == (ssize_t)size ? 0 : count < 0 ? -errno : -ENOSPC;
    close(fd);
    return error;
}

int make_directories(const char *path) {
    char copy[4096];
    if (strlen(path) >= sizeof copy)
        return -ENAMETOOLONG;
    strcpy(copy, path);
    for (char *slash = copy + 1; *slash && (slash = strchr(slash, '/')); slash++) {
        *slash = 0;
        if (mkdir(copy, 0755) && errno != EEXIST)
            return -errno;
        *slash = '/';
    }
    return 0;
}

const char *errno_name(int number) {
    static const struct { int number; const char *name; } names[] = {
        {EPERM, "EPERM"}, {ENOENT, "ENOENT"}, {EIO, "EIO"}, {E2BIG, "E2BIG"}, {ENOEXEC, "ENOEXEC"},
        {EBADF, "EBADF"}, {EAGAIN, "EAGAIN"}, {ENOMEM, "ENOMEM"}, {EACCES, "EACCES"}, {EBUSY, "EBUSY"},
        {EEXIST, "EEXIST"}, {ENOTDIR, "ENOTDIR"}, {EISDIR, "EISDIR"}, {EINVAL, "EINVAL"},
        {ENFILE, "ENFILE"}, {EMFILE, "EMFILE"}, {ETXTBSY, "ETXTBSY"}, {EFBIG, "EFBIG"}, {ENXIO, "ENXIO"},
        {ENOSPC, "ENOSPC"}, {EROFS, "EROFS"}, {EPIPE, "EPIPE"}, {ENAMETOOLONG, "ENAMETOOLONG"},
        {ELOOP, "ELOOP"}, {EPROTO, "EPROTO"}, {EDQUOT, "EDQUOT"}, {ENODEV, "ENODEV"}, {ENOTEMPTY, "ENOTEMPTY"},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].number == number)
            return names[i].name;
    return "EUNKNOWN";
}

int hex_decode(const char *hex, uint8_t *out, size_t capacity) {
    size_t size = strlen(hex) / 2;
    if (strlen(hex) % 2 || size > capacity)
        return -1;
    for (size_t i = 0; i < size; i++)
        if (sscanf(hex + 2 * i, "%2hhx", &out[i]) != 1)
            return -1;
    return (int)size;
}

int credit_entropy(const uint8_t *seed, size_t size) {
    struct { int bits, size; uint8_t data[128]; } pool = {.bits = (int)size * 8, .size = (int)size};
    if (size > sizeof pool.data)
        return -EINVAL;
    memcpy(pool.data, seed, size);
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    int error = ioctl(fd, (int)RNDADDENTROPY_NUMBER, &pool) ? -errno : 0;
    /* EAGAIN: the generator is not yet initialised, and will be seeded by what was just credited. */
    if (!error && ioctl(fd, RNDRESEEDCRNG_NUMBER) && errno != EAGAIN)
        error = -errno;
    close(fd);
    explicit_bzero(&pool, sizeof pool);
    return error;
}

/* Splits "a:b:c" in place; returns the number of fields found, at most `most`. */
static size_t split_fields(char *line, char **fields, size_t most) {
    size_t count = 0;
    for (char *part; count < most && (part = strsep(&line, ":\n"));)
        fields[count++] = part;
    return count;
}

/* Whether `key` is fields[0] (a name) or fields[2] (a number). */
static bool names_entry(const char *key, char *const *fields) {
    char *end;
    unsigned long number = strtoul(key, &end, 10);
    return !strcmp(key, fields[0]) || (*key && !*end && number == strtoul(fields[2], NULL, 10));
}

static void find_passwd(const char *user, struct account *account, char *name, size_t size, bool *found) {
    char line[1024], *fields[7];
    FILE *file = fopen("/etc/passwd", "re");
    while (file && !*found && fgets(line, sizeof line, file)) {
        if (split_fields(line, fields, 7) < 6 || !names_entry(user, fields))
            continue;
        account->uid = (uid_t)strtoul(fields[2], NULL, 10);
        account->gid = (gid_t)strtoul(fields[3], NULL, 10);
        snprintf(account->home, sizeof account->home, "%s", fields[5]);
        snprintf(name, size, "%s", fields[0]);
        *found = true;
    }
    if (file)
        fclose(file);
}

static bool listed(char *members, const char *name) {
    for (char *part; (part = strsep(&members, ",\n"));)
        if (*name && !strcmp(part, name))
            return true;
    return false;
}

/* Finds the group `group` (when not NULL) and the groups `name` is a member of. */
static bool find_groups(const char *group, const char *name, struct account *account) {
    char line[4096], *fields[4];
    bool found = !group;
    FILE *file = fopen("/etc/group", "re");
    while (file && fgets(line, sizeof line, file)) {
        if (split_fields(line, fields, 4) < 4)
            continue;
        gid_t gid = (gid_t)strtoul(fields[2], NULL, 10);
        if (group && !found && names_entry(group, fields)) {
            account->gid = gid;
            found = true;
        }
        if (!group && listed(fields[3], name) && account->group_count < 64)
            account->groups[account->group_count++] = gid;
    }
    if (file)
        fclose(file);
    return found;
}

int find_account(const char *user, struct account *account) {
    char copy[256], name[128] = "", *end;
    *account = (struct account){.home = "/"};
    if (!user || !*user)
        user = "0";
    if (strlen(user) >= sizeof copy)
        return -EINVAL;
    strcpy(copy, user);
    char *group = strchr(copy, ':');
    if (group)
        *group++ = 0;
    if (group && !*group)
        group = NULL;
    bool found = false;
    find_passwd(*copy ? copy : "0", account, name, sizeof name, &found);
    if (!found) { /* a number needs no entry, as in OCI */
        account->uid = (uid_t)strtoul(copy, &end, 10);
        if (*end)
            return -EINVAL;
        if (account->uid == 0)
            strcpy(account->home, "/root");
    }
    if (!find_groups(group, name, account)) {
        account->gid = (gid_t)strtoul(group, &end, 10);
        if (*end)
            return -EINVAL;
    }
    return 0;
}
