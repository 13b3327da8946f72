/*
 * The recorder's log, and which files it is about. Included by recorder.c alone.
 *
 * Each call is logged before it is made (with its bytes, or their checksum: recorder_lazy.h) and after it was made (with
 * its result), each time with the next number of one counter that all threads and processes share. What is logged survives the death of the program:
 * it is copied into shared memory maps of files (chunks), or, many bytes at once, written to the file `data`. The
 * recorder keeps no descriptor open, because programs close what they do not know, and no state of its own about
 * descriptors, because they are inherited and duplicated: a file is known by its device and inode.
 * powercut/capture/recorded.py reads the log and shares the layouts below.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
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
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#include <linux/falloc.h>
#include <linux/fs.h>

#define SEEN __attribute__((visibility("default")))
#define REAL(name) ({ static __typeof__(&name) real_; if (!real_) real_ = dlsym(RTLD_NEXT, #name); real_; })

enum { WRITE = 1, ZERO, PUNCH, FLUSH, TRUNCATE, OPEN, LINK, RENAME, UNLINK, SYNC, ALLOCATE, MKDIR, SYMLINK, RANGE,
       NOTE, EXIT, SAVED, BYTES };       /* SAVED: what a range held; BYTES: those of the lazy write at `offset` */
enum { FUA = 1, SPILLED = 2, KEEP_SIZE = 4, CREATED = 8, TRUNCATED = 16, UNNAMED = 32, EXCHANGE = 64, LAZY = 128 };
enum { LOCKS = 64, LOCK_BYTES = 64, INLINE = 8192, FIRST_CHUNK = 256 << 10, LAST_CHUNK = 64 << 20, LAZY_WORDS = 1 << 16 };
static const uint64_t MAGIC = 0x70776372636f7264, GONE = 1;

struct slot { _Atomic uint64_t key, changes, lazy_end; }; /* a file that is recorded; a freed one keeps its counts */
struct control {                        /* made by recorded.py, mapped by every process */
    _Atomic uint64_t locks_ready, position, chunks, data_end, processes, failed, refused;
    uint64_t slots;                     /* of `tracked`: a power of two */
    char pad[512 - 64];
    char locks[LOCKS][LOCK_BYTES];      /* pthread_mutex_t; 0: names, the others: file positions */
    char pad2[8192 - 512 - LOCKS * LOCK_BYTES];
    char roots[8192];                   /* canonical, each ended by NUL, the last by two */
    _Atomic uint64_t lazy[LAZY_WORDS];  /* see recorder_lazy.h */
    struct slot tracked[];              /* open addressing by `key`; 0: free, GONE: freed */
};
struct record {                         /* 64 bytes, then the payload; `magic` is set last */
    _Atomic uint64_t magic;             /* MAGIC xor position */
    uint32_t size, op_and_flags;        /* size with payload, without padding; op | flags << 16 */
    uint64_t position, dev, ino, offset, length, extra;
};
struct chunk { _Atomic uint64_t end; uint64_t size; char pad[48]; };
_Static_assert(sizeof(struct record) == 64 && sizeof(struct chunk) == 64, "layouts that the reader shares");
_Static_assert(sizeof(off_t) == 8, "a machine of 64 bits");
_Static_assert(sizeof(pthread_mutex_t) <= LOCK_BYTES, "a mutex fits");

static struct control *control;
static _Atomic(struct chunk *) chunk;
static char directory[PATH_MAX - 64];

static void fail(int error) {
    uint64_t none = 0;
    atomic_compare_exchange_strong(&control->failed, &none, error ? error : EIO);
}

static void *map_file(const char *name, int flags, size_t *size) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    int fd = REAL(openat)(AT_FDCWD, path, flags | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0) return NULL;
    struct stat st;
    void *map = MAP_FAILED;
    int error = flags & O_CREAT ? REAL(posix_fallocate)(fd, 0, *size) : 0; /* a hole on a full disk would be SIGBUS */
    if (!error && !fstat(fd, &st)) map = REAL(mmap)(NULL, *size = st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    int kept = error ? error : errno;
    close(fd);
    errno = kept;
    return map == MAP_FAILED ? NULL : map;
}

__attribute__((constructor)) static void begin(void) {
    const char *where = getenv("POWERCUT_CAPTURE");
    if (control || !where || strlen(where) >= sizeof directory) return;
    strcpy(directory, where);
    size_t size = 0;
    struct control *found = map_file("control", 0, &size);
    if (!found) return;
    uint64_t none = 0;
    if (atomic_compare_exchange_strong(&found->locks_ready, &none, 1)) {
        pthread_mutexattr_t how;
        pthread_mutexattr_init(&how);
        pthread_mutexattr_setpshared(&how, PTHREAD_PROCESS_SHARED);
        pthread_mutexattr_setrobust(&how, PTHREAD_MUTEX_ROBUST);
        pthread_mutexattr_settype(&how, PTHREAD_MUTEX_ERRORCHECK); /* a signal handler may write too */
        for (int i = 0; i < LOCKS; i++) pthread_mutex_init((pthread_mutex_t *)found->locks[i], &how);
        atomic_store(&found->locks_ready, 2);
    }
    while (atomic_load(&found->locks_ready) != 2) usleep(100);
    atomic_fetch_add(&found->processes, 1);
    control = found;
}

static pthread_mutex_t *lock(unsigned which) {
    pthread_mutex_t *mutex = (pthread_mutex_t *)control->locks[which];
    int error = pthread_mutex_lock(mutex);
    if (error == EOWNERDEAD) pthread_mutex_consistent(mutex);
    return error == 0 || error == EOWNERDEAD ? mutex : NULL;
}

static void unlock(pthread_mutex_t *mutex) {
    if (mutex) pthread_mutex_unlock(mutex);
}

/* ---- which files --------------------------------------------------------------------------------------------- */

static uint64_t key_of(const struct stat *st) {
    uint64_t key = st->st_ino * 0x9E3779B97F4A7C15u ^ st->st_dev * 0xC2B2AE3D27D4EB4Fu;
    return key > GONE ? key : key + 2;
}

static struct slot *tracked(const struct stat *st) {
    uint64_t key = key_of(st), mask = control->slots - 1, found;
    for (uint64_t i = key >> 32; (found = atomic_load(&control->tracked[i & mask].key)); i++)
        if (found == key) return &control->tracked[i & mask];
    return NULL;
}

static struct slot *track(const struct stat *st) {
    uint64_t key = key_of(st), mask = control->slots - 1, first = key >> 32;
    struct slot *slot = tracked(st);
    for (uint64_t i = first; !slot && i < first + mask; i++) {
        uint64_t old = atomic_load(&control->tracked[i & mask].key);
        if (old <= GONE && atomic_compare_exchange_strong(&control->tracked[i & mask].key, &old, key))
            slot = &control->tracked[i & mask];
    }
    return slot ? slot : (fail(ENFILE), NULL);
}

static void forget(const struct stat *st) { /* the inode of a file that is gone was used again elsewhere */
    struct slot *slot;
    while ((slot = tracked(st))) atomic_store(&slot->key, GONE);
}

static struct slot *watched(int fd, struct stat *st) {
    int kept = errno;
    if (!control) begin();
    int known = control && !fstat(fd, st) && (S_ISREG(st->st_mode) || S_ISDIR(st->st_mode));
    struct slot *slot = known ? tracked(st) : NULL;
    errno = kept;
    return slot;
}

static int inside(const char *path) {
    for (const char *root = control->roots; *root; root += strlen(root) + 1) {
        size_t length = strlen(root);
        if (!strncmp(path, root, length) && (path[length] == '/' || !path[length] || length == 1)) return 1;
    }
    return 0;
}

static int path_of(int fd, char *out) { /* as the kernel knows it */
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, out, PATH_MAX - 1);
    out[length < 0 ? 0 : length] = 0;
    return length > 0;
}

/* The canonical path of an entry: its directory as the kernel knows it, and its name. Whether it is inside. */
static int locate(int dir, const char *path, char *out) {
    int kept = errno, yes = 0;
    char parent[PATH_MAX];
    size_t end = path ? strlen(path) : 0;
    while (end > 1 && path[end - 1] == '/') end--;
    size_t base = end;
    while (base && path[base - 1] != '/') base--;
    out[0] = 0;
    if (!control) begin();
    if (control && end > base && end < PATH_MAX && base + 2 < PATH_MAX) {
        memcpy(parent, path, base);
        strcpy(parent + base, ".");
        int fd = REAL(openat)(dir, parent, O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (fd >= 0) {
            size_t length = path_of(fd, out) ? strlen(out) : PATH_MAX;
            if (length + 2 + end - base < PATH_MAX) {
                if (length > 1) out[length++] = '/';
                memcpy(out + length, path + base, end - base);
                out[length + end - base] = 0;
                yes = inside(out);
            }
            close(fd);
        }
    }
    errno = kept;
    return yes;
}

/* ---- the log ------------------------------------------------------------------------------------------------- */

static struct record *reserve(size_t size) {
    size = (size + 63) / 64 * 64;
    for (;;) {
        struct chunk *now = atomic_load(&chunk);
        if (now) {
            uint64_t at = atomic_fetch_add(&now->end, size);
            if (at + size <= now->size) return (struct record *)((char *)now + at);
        }
        char name[64];
        size_t wanted = !now ? FIRST_CHUNK : now->size < LAST_CHUNK ? now->size * 4 : LAST_CHUNK;
        snprintf(name, sizeof name, "chunk.%lu", (unsigned long)atomic_fetch_add(&control->chunks, 1));
        struct chunk *next = map_file(name, O_CREAT | O_EXCL, &wanted);
        if (!next) return fail(errno), NULL;
        next->size = wanted;
        atomic_store(&next->end, sizeof *next);
        if (!atomic_compare_exchange_strong(&chunk, &now, next)) munmap(next, wanted);
    }
}

static int spill(const struct iovec *iov, int count, size_t bytes, uint64_t *at) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/data", directory);
    int fd = REAL(openat)(AT_FDCWD, path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return fail(errno), 0;
    *at = atomic_fetch_add(&control->data_end, (bytes + 4095) / 4096 * 4096);
    ssize_t done = REAL(pwritev)(fd, iov, count, *at);
    if (done >= 0 && (size_t)done != bytes) errno = ENOSPC;
    if ((size_t)done != bytes) fail(errno);
    close(fd);
    return (size_t)done == bytes;
}

static uint64_t publish(struct record *record, unsigned op, const struct stat *st, uint64_t offset, uint64_t length,
                        uint64_t extra, size_t bytes) {
    record->size = sizeof *record + bytes;
    record->op_and_flags = op;
    record->dev = st ? st->st_dev : 0;
    record->ino = st ? st->st_ino : 0;
    record->offset = offset, record->length = length, record->extra = extra;
    uint64_t position = record->position = atomic_fetch_add(&control->position, 1) + 1;
    atomic_store_explicit(&record->magic, MAGIC ^ position, memory_order_release);
    return position;
}

static uint64_t put(unsigned op, unsigned flags, const struct stat *st, uint64_t offset, uint64_t length, uint64_t extra,
                    const struct iovec *iov, int count, size_t bytes) {
    int kept = errno;
    uint64_t position = 0;
    if (atomic_load_explicit(&control->failed, memory_order_relaxed)) return 0;
    if (bytes > INLINE && (op == WRITE || op == BYTES)) {
        if (!spill(iov, count, bytes, &extra)) goto out;
        flags |= SPILLED, count = 0, bytes = 0;
    }
    struct record *record = reserve(sizeof *record + bytes);
    if (!record) goto out;
    char *to = (char *)(record + 1);
    for (int i = 0; i < count; i++) to = mempcpy(to, iov[i].iov_base, iov[i].iov_len);
    position = publish(record, op | flags << 16, st, offset, length, extra, bytes);
out:
    errno = kept;
    return position;
}

static uint64_t enter(unsigned op, unsigned flags, const struct stat *st, uint64_t offset, uint64_t length) {
    return put(op, flags, st, offset, length, 0, NULL, 0, 0);
}

static uint64_t enter_named(unsigned op, unsigned flags, const struct stat *st, const char *one, const char *other) {
    struct iovec names[2] = {{(void *)one, strlen(one) + 1}, {(void *)other, strlen(other) + 1}};
    return put(op, flags, st, 0, 0, 0, names, 2, names[0].iov_len + names[1].iov_len);
}

/* `result` is what the call returned; it is passed on, and so is errno. */
static long leave_as(uint64_t entered, long result, const struct stat *st, uint64_t offset, const char *path) {
    struct iovec name = {(void *)path, path ? strlen(path) + 1 : 0};
    if (entered) put(EXIT, 0, st, offset, result < 0 ? -(long)errno : result, entered, &name, !!path, name.iov_len);
    return result;
}

static long leave(uint64_t entered, long result) { return leave_as(entered, result, NULL, 0, NULL); }

static long refuse(int error, const char *what, const struct stat *st) {
    if (!control) begin();
    if (control) enter_named(NOTE, 0, st, what, "");
    errno = error;
    return -1;
}
