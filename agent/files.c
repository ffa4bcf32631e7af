/* STAT, READ and WRITE. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"

enum { MAX_DEPTH = 64 };

/* A READ under way: the directories open on the way down, and the file whose bytes are sent now. */
struct walk {
    DIR *directories[MAX_DEPTH];
    size_t lengths[MAX_DEPTH]; /* of `path` before the directory's entries */
    int depth;
    int file;
    int64_t left;
    bool follow, last; /* last: a single file, nothing after it */
    bool charged; /* ENTRY and END cost credit: the host grants it for them */
    char path[PATH_MAX];
};

static const char *type_name(mode_t mode) {
    return S_ISDIR(mode) ? "dir" : S_ISLNK(mode) ? "link" : S_ISREG(mode) ? "file" : "other";
}

static void describe(struct text_builder *text, const struct stat *info) {
    text_add(text, "type", type_name(info->st_mode));
    text_addf(text, "mode", "%o", (unsigned)info->st_mode & 07777);
    text_addf(text, "size", "%lld", (long long)info->st_size);
    text_addf(text, "mtime", "%lld", (long long)info->st_mtime);
    text_addf(text, "uid", "%u", (unsigned)info->st_uid);
    text_addf(text, "gid", "%u", (unsigned)info->st_gid);
}

static void add_target(struct text_builder *text, int at, const char *path) {
    char target[PATH_MAX];
    ssize_t size = readlinkat(at, path, target, sizeof target - 1);
    if (size >= 0) {
        target[size] = 0;
        text_add(text, "target", target);
    }
}

void file_stat(struct agent *a, uint32_t id, const struct text_list *request) {
    const char *path = text_list_get(request, "path", "");
    bool follow = !strcmp(text_list_get(request, "follow", "1"), "1");
    struct text_builder text = {.size = 0};
    struct stat info;
    if (fstatat(AT_FDCWD, path, &info, follow ? 0 : AT_SYMLINK_NOFOLLOW)) {
        if (errno != ENOENT && errno != ENOTDIR)
            return send_error(a, id, errno, "stat");
        text_add(&text, "exists", "0");
        return send_text(a, OK, id, &text);
    }
    text_add(&text, "exists", "1");
    describe(&text, &info);
    if (S_ISLNK(info.st_mode))
        add_target(&text, AT_FDCWD, path);
    send_text(a, OK, id, &text);
}

/* -- READ ----------------------------------------------------------------------------------------- */

/* Frames that say what is sent, whole: a tree of many links has nothing else. */
static void charge(struct channel *c, size_t size) {
    if (c->walk->charged)
        c->credit -= (int64_t)(HEADER_SIZE + size);
}

static void read_end(struct agent *a, struct channel *c, bool final) {
    size_t size = final ? 5 : 0;
    send_frame(a, END, c->id, "final", size);
    charge(c, size);
    if (final)
        c->finished = true;
}

/* Announces one entry and opens it. `at`/`name` is how to reach it, walk->path how it is called. 0 or errno. */
static int enter(struct agent *a, struct channel *c, int at, const char *name) {
    struct walk *w = c->walk;
    struct text_builder text = {.size = 0};
    struct stat info;
    if (fstatat(at, name, &info, w->follow ? 0 : AT_SYMLINK_NOFOLLOW) &&
        (errno != ENOENT || fstatat(at, name, &info, AT_SYMLINK_NOFOLLOW)))
        return errno;
    if (!S_ISREG(info.st_mode) && !S_ISDIR(info.st_mode) && !S_ISLNK(info.st_mode))
        return 0; /* sockets, pipes and devices cannot be copied */
    if (!S_ISLNK(info.st_mode)) {
        if (S_ISDIR(info.st_mode) && w->depth == MAX_DEPTH)
            return ENAMETOOLONG;
        int fd = openat(at, name, O_RDONLY | O_NONBLOCK | O_CLOEXEC | (w->follow ? 0 : O_NOFOLLOW));
        if (fd < 0)
            return errno;
        if (S_ISDIR(info.st_mode)) {
            w->directories[w->depth] = must(fdopendir(fd));
            w->lengths[w->depth++] = strlen(w->path);
        } else {
            w->file = fd;
            w->left = info.st_size;
        }
    }
    if (!*w->path) /* the root of a tree is not an entry of it */
        return 0;
    text_add(&text, "path", w->path);
    if (S_ISLNK(info.st_mode))
        add_target(&text, at, name);
    describe(&text, &info);
    send_text(a, ENTRY, c->id, &text);
    charge(c, text.size);
    if (S_ISDIR(info.st_mode) || S_ISLNK(info.st_mode))
        read_end(a, c, false);
    return 0;
}

void file_read(struct agent *a, uint32_t id, const struct text_list *request) {
    const char *path = text_list_get(request, "path", "");
    struct channel *c = channel_add(a, id, CHANNEL_READ);
    if (!c)
        return;
    struct walk *w = c->walk = must(calloc(1, sizeof *w));
    struct stat info;
    w->file = -1;
    w->follow = !strcmp(text_list_get(request, "follow", "0"), "1");
    w->charged = !strcmp(text_list_get(request, "charge", ""), "entries");
    int error = 0;
    if (fstatat(AT_FDCWD, path, &info, w->follow ? 0 : AT_SYMLINK_NOFOLLOW))
        error = errno;
    else if (!S_ISDIR(info.st_mode)) { /* a single file is called by its own name */
        const char *slash = strrchr(path, '/');
        snprintf(w->path, sizeof w->path, "%.255s", slash ? slash + 1 : path);
        w->last = true;
        if (S_ISREG(info.st_mode) == 0 && S_ISLNK(info.st_mode) == 0)
            error = EINVAL;
    }
    if (!error)
        error = enter(a, c, AT_FDCWD, path);
    if (error) {
        send_error(a, id, error, "read");
        c->finished = true;
    }
}

/* Sends the next bytes of the open file; exactly the announced size, zeros where it was cut meanwhile. */
static int read_chunk(struct agent *a, struct channel *c) {
    struct walk *w = c->walk;
    uint8_t chunk[CHUNK];
    size_t most = c->credit < CHUNK ? (size_t)c->credit : CHUNK;
    if ((int64_t)most > w->left)
        most = (size_t)w->left;
    ssize_t count = most ? read(w->file, chunk, most) : 0;
    if (count < 0)
        return errno;
    if (count == 0 && most) {
        memset(chunk, 0, most);
        count = (ssize_t)most;
    }
    if (count)
        send_frame(a, DATA, c->id, chunk, (size_t)count);
    c->credit -= count;
    w->left -= count;
    if (!w->left) {
        close(w->file);
        w->file = -1;
        read_end(a, c, false);
    }
    return 0;
}

static int read_next(struct agent *a, struct channel *c) {
    struct walk *w = c->walk;
    int top = w->depth - 1;
    if (top < 0) {
        read_end(a, c, true);
        return 0;
    }
    errno = 0;
    struct dirent *entry = readdir(w->directories[top]);
    if (!entry) {
        if (errno)
            return errno;
        closedir(w->directories[top]);
        w->depth--;
        return 0;
    }
    if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
        return 0;
    size_t length = w->lengths[top];
    if (length + strlen(entry->d_name) + 2 > sizeof w->path)
        return ENAMETOOLONG;
    sprintf(w->path + length, "%s%s", length ? "/" : "", entry->d_name);
    int error = enter(a, c, dirfd(w->directories[top]), entry->d_name);
    return error == ENOENT ? 0 : error; /* removed since it was listed */
}

void read_service(struct agent *a, struct channel *c) {
    for (int turn = 0; turn < 16 && !c->finished && c->credit > 0 && a->queued < QUEUE_HIGH; turn++) {
        int error = c->walk->file >= 0 ? read_chunk(a, c) : read_next(a, c);
        if (error) {
            send_error(a, c->id, error, c->walk->path);
            c->finished = true;
        }
    }
}

/* -- WRITE ---------------------------------------------------------------------------------------- */

static int open_target(const struct text_list *request, bool directory, int *fd) {
    const char *path = text_list_get(request, "path", "");
    const char *mode = text_list_get(request, "mode", ""), *uid = text_list_get(request, "uid", "");
    const char *gid = text_list_get(request, "gid", "");
    int error = -make_directories(path);
    if (error)
        return error;
    if (directory) {
        if (mkdir(path, 0755) && errno != EEXIST)
            return errno;
        *fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    } else {
        *fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0644);
    }
    if (*fd < 0)
        return errno;
    uid_t owner = *uid ? (uid_t)strtoul(uid, NULL, 10) : (uid_t)-1;
    gid_t group = *gid ? (gid_t)strtoul(gid, NULL, 10) : (gid_t)-1;
    if ((*uid || *gid) && fchown(*fd, owner, group))
        return errno;
    if (*mode && fchmod(*fd, (mode_t)strtoul(mode, NULL, 8) & 07777))
        return errno;
    return 0;
}

static void write_done(struct agent *a, struct channel *c, int error) {
    struct text_builder text = {.size = 0};
    if (c->file >= 0 && close(c->file) && !error)
        error = errno;
    c->file = -1;
    c->finished = true;
    text_addf(&text, "bytes", "%lld", (long long)c->written);
    if (error)
        send_error(a, c->id, error, "write");
    else
        send_text(a, OK, c->id, &text);
}

void file_write(struct agent *a, uint32_t id, const struct text_list *request) {
    struct channel *c = channel_add(a, id, CHANNEL_WRITE);
    if (!c)
        return;
    bool directory = !strcmp(text_list_get(request, "kind", "file"), "dir");
    int error = open_target(request, directory, &c->file);
    if (error)
        write_done(a, c, error);
}

void write_frame(struct agent *a, struct channel *c, const struct frame *frame) {
    if (frame->type == END)
        return write_done(a, c, 0);
    if (frame->type != DATA)
        return;
    for (size_t done = 0; done < frame->size;) {
        ssize_t count = write(c->file, frame->payload + done, frame->size - done);
        if (count <= 0)
            return write_done(a, c, count < 0 ? errno : ENOSPC);
        done += (size_t)count;
    }
    c->written += (int64_t)frame->size;
    send_credit(a, c, frame->size);
}

void file_free(struct channel *c) {
    if (c->file >= 0)
        close(c->file);
    if (!c->walk)
        return;
    if (c->walk->file >= 0)
        close(c->walk->file);
    while (c->walk->depth > 0)
        closedir(c->walk->directories[--c->walk->depth]);
    free(c->walk);
}
