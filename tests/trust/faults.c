/* Loaded before libc (LD_PRELOAD): the n-th change of a folder fails, or the process is killed there.
   Counted are calls that need room or change names: opening to write, write, fsync, rename, mkdir. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char under[PATH_MAX];
static long at, seen;
static int with, again, only_renames;

/* From here on count the changes of what lies under `folder`. The n-th (from 1; 0: none) fails with the errno `error`,
   or kills the process where that is 0; so do all later ones with `lasting`. `renames`: count these alone. */
void fault_set(const char *folder, long n, int error, int lasting, int renames) {
    strncpy(under, folder, sizeof under - 1);
    at = n, with = error, again = lasting, only_renames = renames, seen = 0;
}

long fault_count(void) { return seen; }

static int hit(const char *path, int rename) {
    if (!*under || !path || strncmp(path, under, strlen(under)) || (only_renames && !rename)) return 0;
    seen++;
    if (!at || (again ? seen < at : seen != at)) return 0;
    if (!with) kill(getpid(), SIGKILL);
    errno = with;
    return 1;
}

static int hit_handle(int handle) {
    char link[64], path[PATH_MAX];
    if (!*under) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return hit(path, 0);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPEN(name)                                                     \
    int name(const char *path, int flags, ...) {                       \
        va_list rest;                                                  \
        va_start(rest, flags);                                         \
        mode_t mode = va_arg(rest, mode_t);                            \
        va_end(rest);                                                  \
        if ((flags & O_CREAT) && hit(path, 0)) return -1;              \
        return REAL(name)(path, flags, mode);                          \
    }
OPEN(open)
OPEN(open64)

ssize_t write(int handle, const void *data, size_t size) {
    return hit_handle(handle) ? -1 : REAL(write)(handle, data, size);
}
int fsync(int handle) { return hit_handle(handle) ? -1 : REAL(fsync)(handle); }
int rename(const char *from, const char *to) { return hit(to, 1) ? -1 : REAL(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { return hit(path, 0) ? -1 : REAL(mkdir)(path, mode); }
