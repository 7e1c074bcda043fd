/* LD_PRELOAD library of the fault suite: counts the mutating calls below one path, and breaks the Nth.
 *
 * Nothing happens until nvfp4_fault_arm() was called. From then on every call of the functions below whose path (or
 * whose descriptor's path) begins with the prefix counts as one point. At point N the call fails with an errno, or the
 * process kills itself before the call. `for_good` makes all later points fail as well, but for those that give room
 * back (unlink, rmdir), as on a disk that is full.
 *
 * The counters lie in memory that the arming process shares with its parent, which reads them after the process died.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

struct counters {
    long points; /* calls seen */
    long broken; /* calls that failed */
};

static char prefix[PATH_MAX];
static size_t prefix_length;
static long break_at;
static int break_with; /* errno, or 0 for SIGKILL */
static int for_good;
static int trace = -1;
static struct counters *shared;

/* break_at 0 only counts; trace_descriptor -1 writes no trace */
void nvfp4_fault_arm(const char *path, long at, int error, int forever, int trace_descriptor, void *counters) {
    prefix_length = strlen(path);
    memcpy(prefix, path, prefix_length + 1);
    break_at = at;
    break_with = error;
    for_good = forever;
    trace = trace_descriptor;
    shared = counters; /* last: armed */
}

static int is_below(const char *path) {
    return strncmp(path, prefix, prefix_length) == 0 && (path[prefix_length] == '/' || path[prefix_length] == 0);
}

static void path_of_descriptor(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
}

static void path_at(int folder, const char *name, char *path) {
    char start[PATH_MAX] = "";
    if (name[0] != '/') {
        if (folder == AT_FDCWD) {
            if (getcwd(start, sizeof start) == NULL) start[0] = 0;
        } else
            path_of_descriptor(folder, start);
    }
    if (snprintf(path, PATH_MAX, "%s%s%s", start, start[0] ? "/" : "", name) >= PATH_MAX) path[PATH_MAX - 1] = 0;
}

/* Whether this call has to fail (errno is set). */
static int breaks(const char *call, const char *path, int gives_room) {
    if (shared == NULL || !is_below(path)) return 0;
    long point = __atomic_add_fetch(&shared->points, 1, __ATOMIC_SEQ_CST);
    if (trace >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%s %s\n", call, path);
        syscall(SYS_write, trace, line, (size_t)length);
    }
    if (break_at == 0 || point < break_at) return 0;
    if (point > break_at && (!for_good || gives_room)) return 0;
    __atomic_add_fetch(&shared->broken, 1, __ATOMIC_SEQ_CST);
    if (break_with == 0) {
        syscall(SYS_kill, getpid(), SIGKILL);
        for (;;) pause();
    }
    errno = break_with;
    return 1;
}

static int breaks_at(const char *call, int folder, const char *name, int gives_room) {
    char path[PATH_MAX];
    if (shared == NULL) return 0;
    path_at(folder, name, path);
    return breaks(call, path, gives_room);
}

static int breaks_descriptor(const char *call, int descriptor) {
    char path[PATH_MAX];
    if (shared == NULL) return 0;
    path_of_descriptor(descriptor, path);
    return breaks(call, path, 0);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Opening counts where it can write or create. O_TMPFILE has O_DIRECTORY's bit, and always O_WRONLY or O_RDWR. */
static int opens_to_write(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC)); }

static mode_t mode_of(int flags, va_list list) {
    return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(list, mode_t) : 0;
}

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list list;                                                                                                  \
        va_start(list, flags);                                                                                         \
        mode_t mode = mode_of(flags, list);                                                                            \
        va_end(list);                                                                                                  \
        if (opens_to_write(flags) && breaks_at("open", AT_FDCWD, path, 0)) return -1;                                  \
        return NEXT(name)(path, flags, mode);                                                                          \
    }
#define OPENAT(name)                                                                                                   \
    int name(int folder, const char *path, int flags, ...) {                                                           \
        va_list list;                                                                                                  \
        va_start(list, flags);                                                                                         \
        mode_t mode = mode_of(flags, list);                                                                            \
        va_end(list);                                                                                                  \
        if (opens_to_write(flags) && breaks_at("openat", folder, path, 0)) return -1;                                  \
        return NEXT(name)(folder, path, flags, mode);                                                                  \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

/* Calls on a descriptor: result type, name, parameters, arguments; the first argument is the descriptor. */
#define ON_DESCRIPTOR(type, name, parameters, arguments)                                                               \
    type name parameters { return breaks_descriptor(#name, descriptor) ? -1 : NEXT(name) arguments; }
#define RETURNS_ERROR(name)                                                                                            \
    int name(int descriptor, off_t offset, off_t length) {                                                             \
        return breaks_descriptor(#name, descriptor) ? errno : NEXT(name)(descriptor, offset, length);                  \
    }

ON_DESCRIPTOR(ssize_t, write, (int descriptor, const void *data, size_t size), (descriptor, data, size))
ON_DESCRIPTOR(ssize_t, pwrite, (int descriptor, const void *data, size_t size, off_t offset),
              (descriptor, data, size, offset))
ON_DESCRIPTOR(ssize_t, pwrite64, (int descriptor, const void *data, size_t size, off_t offset),
              (descriptor, data, size, offset))
ON_DESCRIPTOR(int, ftruncate, (int descriptor, off_t length), (descriptor, length))
ON_DESCRIPTOR(int, ftruncate64, (int descriptor, off_t length), (descriptor, length))
ON_DESCRIPTOR(int, fallocate, (int descriptor, int mode, off_t offset, off_t length),
              (descriptor, mode, offset, length))
ON_DESCRIPTOR(int, fallocate64, (int descriptor, int mode, off_t offset, off_t length),
              (descriptor, mode, offset, length))
ON_DESCRIPTOR(int, fsync, (int descriptor), (descriptor))
ON_DESCRIPTOR(int, fdatasync, (int descriptor), (descriptor))
ON_DESCRIPTOR(int, fchmod, (int descriptor, mode_t mode), (descriptor, mode))
RETURNS_ERROR(posix_fallocate)
RETURNS_ERROR(posix_fallocate64)

ssize_t copy_file_range(int from, off_t *from_offset, int descriptor, off_t *offset, size_t size, unsigned flags) {
    if (breaks_descriptor("copy_file_range", descriptor)) return -1;
    return NEXT(copy_file_range)(from, from_offset, descriptor, offset, size, flags);
}

/* Calls on names: the path that tells whether the call counts is the one that appears or goes away. */
#define ON_NAME(name, parameters, arguments, folder, path, gives_room)                                                 \
    int name parameters { return breaks_at(#name, folder, path, gives_room) ? -1 : NEXT(name) arguments; }

ON_NAME(rename, (const char *old, const char *new), (old, new), AT_FDCWD, new, 0)
ON_NAME(renameat, (int old_folder, const char *old, int folder, const char *new), (old_folder, old, folder, new),
        folder, new, 0)
ON_NAME(renameat2, (int old_folder, const char *old, int folder, const char *new, unsigned flags),
        (old_folder, old, folder, new, flags), folder, new, 0)
ON_NAME(link, (const char *old, const char *new), (old, new), AT_FDCWD, new, 0)
ON_NAME(linkat, (int old_folder, const char *old, int folder, const char *new, int flags),
        (old_folder, old, folder, new, flags), folder, new, 0)
ON_NAME(symlink, (const char *old, const char *new), (old, new), AT_FDCWD, new, 0)
ON_NAME(unlink, (const char *path), (path), AT_FDCWD, path, 1)
ON_NAME(unlinkat, (int folder, const char *path, int flags), (folder, path, flags), folder, path, 1)
ON_NAME(rmdir, (const char *path), (path), AT_FDCWD, path, 1)
ON_NAME(mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, 0)
ON_NAME(mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode), folder, path, 0)
ON_NAME(truncate, (const char *path, off_t length), (path, length), AT_FDCWD, path, 0)
