/* A disk that fails: preloaded into a test's process, it counts the changes of files under one folder, and at a chosen
   one kills the process or refuses with an errno. Unarmed it changes nothing.

   cc -shared -fPIC -O1 -o disk.so disk.c -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MAX_FD = 65536 };
static char root[4096];
static atomic_int armed, count, at, times, action;
static atomic_char watched[MAX_FD];

/* From the change number `first` on, `number` of them are refused with errno `what`; 0: the process is killed. */
void disk_arm(const char *folder, int first, int number, int what) {
  strncpy(root, folder, sizeof root - 1);
  atomic_store(&count, 0);
  atomic_store(&at, first);
  atomic_store(&times, number);
  atomic_store(&action, what);
  atomic_store(&armed, 1);
}

int disk_count(void) { return atomic_load(&count); }

static int refused(void) {
  int number = atomic_fetch_add(&count, 1) + 1;
  if (number < atomic_load(&at) || number >= atomic_load(&at) + atomic_load(&times)) return 0;
  if (atomic_load(&action) == 0) kill(getpid(), SIGKILL);
  errno = atomic_load(&action);
  return 1;
}

static int under(int dirfd, const char *path) {
  char link[64], folder[4096];
  if (!atomic_load(&armed) || path == NULL) return 0;
  if (path[0] == '/') return strncmp(path, root, strlen(root)) == 0;
  if (dirfd == AT_FDCWD) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
  ssize_t length = readlink(link, folder, sizeof folder - 1);
  if (length < 0) return 0;
  folder[length] = 0;
  return strncmp(folder, root, strlen(root)) == 0;
}

static int is_watched(int fd) { return atomic_load(&armed) && fd >= 0 && fd < MAX_FD && watched[fd]; }

#define REAL(type, name, ...)                          \
  static type (*real)(__VA_ARGS__);                    \
  if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int opened(int fd, int is_under, int flags) {
  if (fd >= 0 && fd < MAX_FD) watched[fd] = is_under && (flags & O_ACCMODE) != O_RDONLY;
  return fd;
}

#define OPEN(name)                                                             \
  int name(const char *path, int flags, ...) {                                 \
    REAL(int, #name, const char *, int, ...);                                  \
    va_list args;                                                              \
    va_start(args, flags);                                                     \
    mode_t mode = va_arg(args, mode_t);                                        \
    va_end(args);                                                              \
    int inside = under(AT_FDCWD, path);                                        \
    if (inside && (flags & O_CREAT) && refused()) return -1;                   \
    return opened(real(path, flags, mode), inside, flags);                     \
  }
#define OPENAT(name)                                                           \
  int name(int dirfd, const char *path, int flags, ...) {                      \
    REAL(int, #name, int, const char *, int, ...);                             \
    va_list args;                                                              \
    va_start(args, flags);                                                     \
    mode_t mode = va_arg(args, mode_t);                                        \
    va_end(args);                                                              \
    int inside = under(dirfd, path);                                           \
    if (inside && (flags & O_CREAT) && refused()) return -1;                   \
    return opened(real(dirfd, path, flags, mode), inside, flags);              \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
  REAL(int, "close", int);
  if (fd >= 0 && fd < MAX_FD) watched[fd] = 0;
  return real(fd);
}

#define ON_FD(type, name, declared, ...)                                       \
  type name declared {                                                         \
    static type(*real) declared;                                               \
    if (!real) real = (type(*) declared)dlsym(RTLD_NEXT, #name);               \
    if (is_watched(fd) && refused()) return -1;                                \
    return real(__VA_ARGS__);                                                  \
  }
ON_FD(ssize_t, write, (int fd, const void *data, size_t size), fd, data, size)
ON_FD(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t offset), fd, data, size, offset)
ON_FD(ssize_t, pwrite64, (int fd, const void *data, size_t size, off_t offset), fd, data, size, offset)
ON_FD(ssize_t, writev, (int fd, const struct iovec *data, int number), fd, data, number)
ON_FD(ssize_t, pwritev, (int fd, const struct iovec *data, int number, off_t offset), fd, data, number, offset)
ON_FD(ssize_t, pwritev64, (int fd, const struct iovec *data, int number, off_t offset), fd, data, number, offset)
ON_FD(int, fsync, (int fd), fd)
ON_FD(int, fdatasync, (int fd), fd)
ON_FD(int, ftruncate, (int fd, off_t size), fd, size)
ON_FD(int, ftruncate64, (int fd, off_t size), fd, size)

#define ON_PATH(name, declared, dirfd, path, ...)                              \
  int name declared {                                                          \
    static int(*real) declared;                                                \
    if (!real) real = (int(*) declared)dlsym(RTLD_NEXT, #name);                \
    if (under(dirfd, path) && refused()) return -1;                            \
    return real(__VA_ARGS__);                                                  \
  }
ON_PATH(rename, (const char *from, const char *to), AT_FDCWD, to, from, to)
ON_PATH(renameat, (int one, const char *from, int two, const char *to), two, to, one, from, two, to)
ON_PATH(renameat2, (int one, const char *from, int two, const char *to, unsigned flags), two, to, one, from, two, to,
        flags)
ON_PATH(link, (const char *from, const char *to), AT_FDCWD, to, from, to)
ON_PATH(mkdir, (const char *path, mode_t mode), AT_FDCWD, path, path, mode)
ON_PATH(mkdirat, (int dirfd, const char *path, mode_t mode), dirfd, path, dirfd, path, mode)
ON_PATH(unlink, (const char *path), AT_FDCWD, path, path)
ON_PATH(unlinkat, (int dirfd, const char *path, int flags), dirfd, path, dirfd, path, flags)
ON_PATH(rmdir, (const char *path), AT_FDCWD, path, path)
