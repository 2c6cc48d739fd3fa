/* A disk that fails: LD_PRELOAD of tests/faults.py. It counts the calls that change the disk below some folders, and lets one
 * of them fail, or ends the process there. It sits below every library: Python, Arrow, DuckDB, Rust. Writes of stdio (fwrite)
 * and of memory maps are not seen. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CREATE = 1, WRITE = 2, SYNC = 4, RENAME = 8, FOLDER = 16, REMOVE = 32, LINK = 64, TRUNCATE = 128, READ = 256 };
enum { ONCE = 0, FROM = 1, SHORT = 2, KILL = 3, KILL_INSIDE = 4 };
enum { GO = 0, FAIL = 1, HALF = 2, HALF_KILL = 3 };

static char roots[16][PATH_MAX];
static int num_roots, how, number, calls;
static long at, count;
static volatile int is_armed;

/* Folders that end in 0 after the last one; `calls_` is a sum of the first enum. */
void faults_arm(const char *folders, int how_, int number_, long at_, int calls_) {
    num_roots = 0;
    for (const char *folder = folders; *folder && num_roots < 16; folder += strlen(folder) + 1)
        snprintf(roots[num_roots++], PATH_MAX, "%s", folder);
    how = how_, number = number_, at = at_, calls = calls_, count = 0;
    is_armed = 1;
}

void faults_disarm(void) { is_armed = 0; }
long faults_count(void) { return count; }

static int is_below(const char *path) {
    for (int i = 0; i < num_roots; i++) {
        size_t length = strlen(roots[i]);
        if (!strncmp(path, roots[i], length) && (path[length] == '/' || path[length] == 0)) return 1;
    }
    return 0;
}

static int names_below(int folder, const char *path) {
    char whole[2 * PATH_MAX], base[PATH_MAX], link[64];
    if (!is_armed || !path) return 0;
    if (path[0] == '/') return is_below(path);
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 0) return 0;
        base[length] = 0;
    }
    snprintf(whole, sizeof whole, "%s/%s", base, path);
    return is_below(whole);
}

static int is_open_below(int handle) {
    char link[64], path[PATH_MAX];
    if (!is_armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_below(path);
}

static int decide(int call) {
    if (!is_armed || !(calls & call)) return GO;
    long own = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (own < at || at <= 0) return GO;
    if (how == FROM || (how == ONCE && own == at) || (how == SHORT && own > at)) { errno = number; return FAIL; }
    if (own != at) return GO;
    if (how == KILL) kill(getpid(), SIGKILL);
    if (how == SHORT) {
        if (call == WRITE) return HALF;
        errno = number;
        return FAIL;
    }
    return how == KILL_INSIDE ? HALF_KILL : GO;
}

static void end(int what) { if (what == HALF_KILL) kill(getpid(), SIGKILL); }
static size_t part(int what, size_t size) { return what >= HALF ? size / 2 : size; }

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPENING(flags) (((flags) & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC)) ? CREATE : READ)
#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        MODE(flags); REAL(int, #name, const char *, int, ...); \
        int what = names_below(AT_FDCWD, path) ? decide(OPENING(flags)) : GO; \
        if (what == FAIL) return -1; \
        int handle = real(path, flags, mode); end(what); return handle; }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        MODE(flags); REAL(int, #name, int, const char *, int, ...); \
        int what = names_below(folder, path) ? decide(OPENING(flags)) : GO; \
        if (what == FAIL) return -1; \
        int handle = real(folder, path, flags, mode); end(what); return handle; }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(FILE *, #name, const char *, const char *); \
        int what = names_below(AT_FDCWD, path) ? decide(mode[0] == 'r' && !strchr(mode, '+') ? READ : CREATE) : GO; \
        if (what == FAIL) return NULL; \
        FILE *file = real(path, mode); end(what); return file; }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int handle, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    int what = is_open_below(handle) ? decide(WRITE) : GO;
    if (what == FAIL) return -1;
    ssize_t done = real(handle, data, part(what, size)); end(what); return done;
}

#define PWRITE(name, offset_t) \
    ssize_t name(int handle, const void *data, size_t size, offset_t offset) { \
        REAL(ssize_t, #name, int, const void *, size_t, offset_t); \
        int what = is_open_below(handle) ? decide(WRITE) : GO; \
        if (what == FAIL) return -1; \
        ssize_t done = real(handle, data, part(what, size), offset); end(what); return done; }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int handle, const struct iovec *parts, int number_of_parts) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    int what = is_open_below(handle) ? decide(WRITE) : GO;
    if (what == FAIL) return -1;
    ssize_t done = what >= HALF ? write(handle, parts[0].iov_base, parts[0].iov_len / 2) : real(handle, parts, number_of_parts);
    end(what); return done;
}

#define SENDFILE(name, offset_t) \
    ssize_t name(int target, int source, offset_t *offset, size_t size) { \
        REAL(ssize_t, #name, int, int, offset_t *, size_t); \
        int what = is_open_below(target) ? decide(WRITE) : GO; \
        if (what == FAIL) return -1; \
        ssize_t done = real(target, source, offset, what >= HALF ? 100 : size); end(what); return done; }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int source, off64_t *from, int target, off64_t *to, size_t size, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    int what = is_open_below(target) ? decide(WRITE) : GO;
    if (what == FAIL) return -1;
    ssize_t done = real(source, from, target, to, what >= HALF ? 100 : size, flags); end(what); return done;
}

#define HANDLE(name, call, parameters, forward) \
    int name parameters { \
        static int (*real) parameters; \
        if (!real) real = (int (*) parameters)dlsym(RTLD_NEXT, #name); \
        int what = is_open_below(handle) ? decide(call) : GO; \
        if (what == FAIL) return -1; \
        int result = real forward; end(what); return result; }
HANDLE(fsync, SYNC, (int handle), (handle))
HANDLE(fdatasync, SYNC, (int handle), (handle))
HANDLE(ftruncate, TRUNCATE, (int handle, off_t size), (handle, size))
HANDLE(ftruncate64, TRUNCATE, (int handle, off64_t size), (handle, size))
HANDLE(fallocate, TRUNCATE, (int handle, int mode, off_t from, off_t size), (handle, mode, from, size))
HANDLE(fallocate64, TRUNCATE, (int handle, int mode, off64_t from, off64_t size), (handle, mode, from, size))

#define PATH(name, call, folder, path, parameters, forward) \
    int name parameters { \
        static int (*real) parameters; \
        if (!real) real = (int (*) parameters)dlsym(RTLD_NEXT, #name); \
        int what = names_below(folder, path) ? decide(call) : GO; \
        if (what == FAIL) return -1; \
        int result = real forward; end(what); return result; }
PATH(rename, RENAME, AT_FDCWD, b, (const char *a, const char *b), (a, b))
PATH(renameat, RENAME, e, b, (int d, const char *a, int e, const char *b), (d, a, e, b))
PATH(renameat2, RENAME, e, b, (int d, const char *a, int e, const char *b, unsigned f), (d, a, e, b, f))
PATH(mkdir, FOLDER, AT_FDCWD, a, (const char *a, mode_t m), (a, m))
PATH(mkdirat, FOLDER, d, a, (int d, const char *a, mode_t m), (d, a, m))
PATH(unlink, REMOVE, AT_FDCWD, a, (const char *a), (a))
PATH(unlinkat, REMOVE, d, a, (int d, const char *a, int f), (d, a, f))
PATH(rmdir, REMOVE, AT_FDCWD, a, (const char *a), (a))
PATH(link, LINK, AT_FDCWD, b, (const char *a, const char *b), (a, b))
PATH(linkat, LINK, e, b, (int d, const char *a, int e, const char *b, int f), (d, a, e, b, f))
PATH(symlink, LINK, AT_FDCWD, b, (const char *a, const char *b), (a, b))
PATH(truncate, TRUNCATE, AT_FDCWD, a, (const char *a, off_t s), (a, s))
