/* Stands before libc and writes down, in order, what a process does to the files below one directory.
 *
 * POWER_CUT_ROOT is the directory, POWER_CUT_LOG the list. A line of the list is
 *   letter TAB path TAB number TAB number LF
 * and after a `w` (write) as many bytes as the second number says. Syncs are written down and not carried out: the
 * model in power_cut.py decides what they were worth. One lock around everything makes the order of the list the order
 * of the happenings.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *root;
static size_t root_length;
static int list = -1;

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("POWER_CUT_LOG");
    root = getenv("POWER_CUT_ROOT");
    if (!root || !path) { root = NULL; return; }
    root_length = strlen(root);
    REAL(open);
    list = real(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (list < 0) abort();
}

static int ours(const char *path) {
    return root && path && strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || !path[root_length]);
}

static int ours_fd(int fd, char *path) {
    char link[64];
    if (!root || fd == list) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return ours(path) && !strstr(path, " (deleted)");
}

static void note(char letter, const char *path, long long a, long long b, const void *bytes) {
    char head[PATH_MAX + 64];
    int length = snprintf(head, sizeof head, "%c\t%s\t%lld\t%lld\n", letter, path, a, b);
    struct iovec parts[2] = {{head, (size_t)length}, {(void *)bytes, bytes ? (size_t)b : 0}};
    ssize_t want = length + (ssize_t)parts[1].iov_len;
    if (writev(list, parts, 2) != want) abort();
}

static int opened(int (*real)(const char *, int, ...), const char *path, int flags, mode_t mode) {
    if (!ours(path)) return real(path, flags, mode);
    pthread_mutex_lock(&lock);
    struct stat before;
    int was = stat(path, &before) == 0, fd = real(path, flags, mode), error = errno;
    if (fd >= 0 && !was) note('c', path, 0, 0, NULL);
    else if (fd >= 0 && (flags & O_TRUNC) && before.st_size) note('t', path, 0, 0, NULL);
    pthread_mutex_unlock(&lock);
    errno = error;
    return fd;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        return opened(real, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

static ssize_t written(int fd, const void *bytes, size_t size, off64_t at, ssize_t (*plain)(int, const void *, size_t)) {
    char path[PATH_MAX];
    REAL(pwrite64);
    if (!ours_fd(fd, path)) return plain ? plain(fd, bytes, size) : real(fd, bytes, size, at);
    pthread_mutex_lock(&lock);
    if (plain) at = fcntl(fd, F_GETFL) & O_APPEND ? lseek64(fd, 0, SEEK_END) : lseek64(fd, 0, SEEK_CUR);
    ssize_t done = plain ? plain(fd, bytes, size) : real(fd, bytes, size, at);
    int error = errno;
    if (done > 0) note('w', path, at, done, bytes);
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

ssize_t write(int fd, const void *bytes, size_t size) { REAL(write); return written(fd, bytes, size, 0, real); }
ssize_t pwrite(int fd, const void *bytes, size_t size, off_t at) { return written(fd, bytes, size, at, NULL); }
ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t at) { return written(fd, bytes, size, at, NULL); }

/* Several pieces in one call, written down as one write of what was taken. */
static ssize_t gathered(int fd, const struct iovec *parts, int count, off64_t at, int flags) {
    static ssize_t (*real)(int, const struct iovec *, int, off64_t, int);
    if (!real) real = (__typeof__(real))dlsym(RTLD_NEXT, "pwritev64v2");
    char path[PATH_MAX];
    if (!ours_fd(fd, path)) return real(fd, parts, count, at, flags);
    pthread_mutex_lock(&lock);
    ssize_t done = real(fd, parts, count, at, flags);
    int error = errno;
    if (done > 0) {
        char *bytes = malloc((size_t)done), *to = bytes;
        if (!bytes) abort();
        for (int i = 0; i < count && to < bytes + done; i++) {
            size_t left = (size_t)(bytes + done - to), size = parts[i].iov_len < left ? parts[i].iov_len : left;
            memcpy(to, parts[i].iov_base, size);
            to += size;
        }
        note('w', path, at, done, bytes);
        free(bytes);
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) { return gathered(fd, parts, count, at, 0); }
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t at) { return gathered(fd, parts, count, at, 0); }
ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t at, int flags) {
    return gathered(fd, parts, count, at, flags);
}
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t at, int flags) {
    return gathered(fd, parts, count, at, flags);
}

static int sized(int (*real)(int, off64_t), int fd, off64_t size) {
    char path[PATH_MAX];
    if (!ours_fd(fd, path)) return real(fd, size);
    pthread_mutex_lock(&lock);
    int done = real(fd, size), error = errno;
    if (done == 0) note('t', path, size, 0, NULL);
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}
int ftruncate(int fd, off_t size) { REAL(ftruncate); return sized((int (*)(int, off64_t))real, fd, size); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); return sized(real, fd, size); }

static int allocated(int (*real)(int, off64_t, off64_t), int fd, off64_t at, off64_t size) {
    char path[PATH_MAX];
    if (!ours_fd(fd, path)) return real(fd, at, size);
    pthread_mutex_lock(&lock);
    int done = real(fd, at, size);
    if (done == 0) note('t', path, at + size, 0, NULL);
    pthread_mutex_unlock(&lock);
    return done;
}
int posix_fallocate(int fd, off_t at, off_t size) {
    REAL(posix_fallocate);
    return allocated((int (*)(int, off64_t, off64_t))real, fd, at, size);
}
int posix_fallocate64(int fd, off64_t at, off64_t size) { REAL(posix_fallocate64); return allocated(real, fd, at, size); }

static int synced(int (*real)(int), int fd) {
    char path[PATH_MAX];
    if (!ours_fd(fd, path)) return real(fd);
    pthread_mutex_lock(&lock);
    note('s', path, 0, 0, NULL);
    pthread_mutex_unlock(&lock);
    return 0;
}
int fsync(int fd) { REAL(fsync); return synced(real, fd); }
int fdatasync(int fd) { REAL(fdatasync); return synced(real, fd); }

static int one(char letter, int (*real)(const char *), const char *path) {
    if (!ours(path)) return real(path);
    pthread_mutex_lock(&lock);
    int done = real(path), error = errno;
    if (done == 0) note(letter, path, 0, 0, NULL);
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}
int unlink(const char *path) { REAL(unlink); return one('u', real, path); }
int rmdir(const char *path) { REAL(rmdir); return one('u', real, path); }
int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    if (!ours(path)) return real(path, mode);
    pthread_mutex_lock(&lock);
    int done = real(path, mode), error = errno;
    if (done == 0) note('m', path, 0, 0, NULL);
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

/* Two paths: the first has a line of its own. */
static int two(char letter, int (*real)(const char *, const char *), const char *from, const char *to) {
    if (!ours(from) || !ours(to)) return real(from, to);
    pthread_mutex_lock(&lock);
    int done = real(from, to), error = errno;
    if (done == 0) { note('f', from, 0, 0, NULL); note(letter, to, 0, 0, NULL); }
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}
int rename(const char *from, const char *to) { REAL(rename); return two('r', real, from, to); }
int link(const char *from, const char *to) { REAL(link); return two('l', real, from, to); }
