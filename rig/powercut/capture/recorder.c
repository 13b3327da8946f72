/*
 * The recorder: preloaded into a program, it logs what the program asks of the files under some directories.
 *
 * Ways to write that cannot be seen are refused (io_uring, libaio, splice ...: programs fall back to writes), done by
 * a read and a write (copy_file_range, sendfile) or noted (shared mappings). Changes of directories are made one at a
 * time, so that their order is known; so are writes at a file's own position, which the kernel does anyway.
 */
#include "recorder_log.h"
#include "recorder_lazy.h"

#define HERE AT_FDCWD
#define ALSO(name, of) extern __typeof__(of) name __attribute__((alias(#of))) SEEN;

/* ---- writes -------------------------------------------------------------------------------------------------- */

static ssize_t really(int fd, const struct iovec *iov, int count, off_t at, int how) {
    if (how) return REAL(pwritev2)(fd, iov, count, at, how);
    if (at < 0) return count == 1 ? REAL(write)(fd, iov->iov_base, iov->iov_len) : REAL(writev)(fd, iov, count);
    return count == 1 ? REAL(pwrite)(fd, iov->iov_base, iov->iov_len, at) : REAL(pwritev)(fd, iov, count, at);
}

static ssize_t wrote(int fd, const struct iovec *iov, int count, off_t at, int how) { /* at < 0: where the file is */
    struct stat st;
    struct slot *slot = watched(fd, &st);
    int mode;
    if (!slot || !S_ISREG(st.st_mode) || (mode = fcntl(fd, F_GETFL)) < 0 || (mode & O_ACCMODE) == O_RDONLY)
        return really(fd, iov, count, at, how);
    size_t bytes = 0;
    for (int i = 0; i < count; i++) bytes += iov[i].iov_len;
    int append = (mode & O_APPEND) || (how & RWF_APPEND);
    pthread_mutex_t *held = append || at < 0 ? lock(1 + key_of(&st) % (LOCKS - 1)) : NULL;
    if (held && append) fstat(fd, &st);
    off_t asked = append ? st.st_size : at < 0 ? lseek(fd, 0, SEEK_CUR) : at, place = asked;
    int fua = (mode & O_DSYNC) || (how & (RWF_DSYNC | RWF_SYNC)) ? FUA : 0; /* O_SYNC holds O_DSYNC */
    uint64_t before = change(slot, &st, fd, place, place + bytes);
    int lazy = alone(before) && count == 1 && bytes >= LAZY_FROM && !fua && !(mode & O_DIRECT) && (st.st_mode & S_IRUSR);
    if (lazy) set_lazy(slot, place, place + bytes);
    uint64_t entered = lazy ? put(WRITE, LAZY, &st, place, bytes, powercut_checksum(iov->iov_base, bytes), NULL, 0, 0)
                            : put(WRITE, fua, &st, place, bytes, 0, iov, count, bytes);
    ssize_t done = really(fd, iov, count, at, how);
    int kept = errno;
    if (done > 0 && append) { /* others may have made the file longer meanwhile */
        fstat(fd, &st);
        place = (at < 0 ? lseek(fd, 0, SEEK_CUR) : st.st_size) - done;
    }
    if (lazy && entered && (interrupted(slot, before) || place != asked || done != (ssize_t)bytes))
        put(BYTES, 0, &st, entered, bytes, 0, iov, count, bytes);
    errno = kept;
    leave_as(entered, done, NULL, place, NULL);
    changed(slot, 0);
    unlock(held);
    errno = kept;
    return done;
}

static ssize_t wrote_one(int fd, const void *data, size_t length, off_t at) {
    struct iovec one = {(void *)data, length};
    return wrote(fd, &one, 1, at, 0);
}

SEEN ssize_t write(int fd, const void *data, size_t length) { return wrote_one(fd, data, length, -1); }
SEEN ssize_t writev(int fd, const struct iovec *iov, int count) { return wrote(fd, iov, count, -1, 0); }
SEEN ssize_t pwrite(int fd, const void *data, size_t length, off_t at) {
    return at < 0 ? REAL(pwrite)(fd, data, length, at) : wrote_one(fd, data, length, at);
}
SEEN ssize_t pwritev(int fd, const struct iovec *iov, int count, off_t at) {
    return at < 0 ? REAL(pwritev)(fd, iov, count, at) : wrote(fd, iov, count, at, 0);
}
SEEN ssize_t pwritev2(int fd, const struct iovec *iov, int count, off_t at, int how) {
    return wrote(fd, iov, count, at, how);
}
ALSO(pwrite64, pwrite) ALSO(pwritev64, pwritev) ALSO(pwritev64v2, pwritev2)

static ssize_t unseen_copy(int fd, int error, const char *what) { /* 0: not to a file that is recorded */
    struct stat st;
    return watched(fd, &st) ? refuse(error, what, &st) : 0;
}

/* A copy inside the kernel to a file that is recorded, as a read and a write: a part of it, which is allowed. */
static ssize_t copied(int in, off_t *from, int out, off_t *to, size_t length) {
    size_t most = length < 256 << 10 ? length : 256 << 10;
    char *piece = malloc(most);
    if (!piece) return -1;
    ssize_t got = from ? pread(in, piece, most, *from) : read(in, piece, most), done = got;
    if (got > 0) done = to ? pwrite(out, piece, got, *to) : write(out, piece, got);
    free(piece);
    if (got <= 0) return got;
    if (!from && done < got) lseek(in, (done < 0 ? 0 : done) - got, SEEK_CUR);
    if (done > 0 && from) *from += done;
    if (done > 0 && to) *to += done;
    return done;
}

SEEN ssize_t copy_file_range(int in, off_t *from, int out, off_t *to, size_t length, unsigned flags) {
    struct stat st;
    if (flags || !watched(out, &st)) return REAL(copy_file_range)(in, from, out, to, length, flags);
    return copied(in, from, out, to, length);
}
SEEN ssize_t sendfile(int out, int in, off_t *from, size_t length) {
    struct stat st;
    return watched(out, &st) ? copied(in, from, out, NULL, length) : REAL(sendfile)(out, in, from, length);
}
SEEN ssize_t splice(int in, off_t *from, int out, off_t *to, size_t length, unsigned flags) {
    return unseen_copy(out, EINVAL, "splice") ?: REAL(splice)(in, from, out, to, length, flags);
}
ALSO(sendfile64, sendfile)

SEEN int ioctl(int fd, unsigned long request, ...) {
    va_list list;
    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    if ((request == FICLONE || request == FICLONERANGE || request == FIDEDUPERANGE) && unseen_copy(fd, EOPNOTSUPP, "clone"))
        return -1;
    return REAL(ioctl)(fd, request, argument);
}

SEEN void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t at) {
    struct stat st;
    int shared = (flags & MAP_TYPE) == MAP_SHARED || (flags & MAP_TYPE) == MAP_SHARED_VALIDATE;
    int writable = shared && (protection & PROT_WRITE) && !(flags & MAP_ANONYMOUS);
    struct slot *slot = writable ? watched(fd, &st) : NULL;
    if (slot) enter_named(NOTE, 0, &st, "mmap", ""), forgo_open(slot, &st, fd);
    return REAL(mmap)(address, length, protection, flags, fd, at);
}
ALSO(mmap64, mmap)

/* ---- sizes, holes, durability -------------------------------------------------------------------------------- */

SEEN int ftruncate(int fd, off_t length) {
    struct stat st;
    struct slot *slot = watched(fd, &st);
    if (!slot) return REAL(ftruncate)(fd, length);
    change(slot, &st, fd, length, ALL);
    return changed(slot, leave(enter(TRUNCATE, 0, &st, 0, length), REAL(ftruncate)(fd, length)));
}
SEEN int truncate(const char *path, off_t length) {
    struct stat st;
    if (!control) begin();
    struct slot *slot = control && !stat(path, &st) ? tracked(&st) : NULL;
    if (!slot) return REAL(truncate)(path, length);
    change_named(slot, &st, HERE, path, length);
    return changed(slot, leave(enter(TRUNCATE, 0, &st, 0, length), REAL(truncate)(path, length)));
}
ALSO(ftruncate64, ftruncate) ALSO(truncate64, truncate)

SEEN int fallocate(int fd, int mode, off_t at, off_t length) {
    struct stat st;
    struct slot *slot = watched(fd, &st);
    if (!slot) return REAL(fallocate)(fd, mode, at, length);
    int kind = mode & ~FALLOC_FL_KEEP_SIZE, flags = mode & FALLOC_FL_KEEP_SIZE ? KEEP_SIZE : 0;
    if (kind & (FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_INSERT_RANGE)) return refuse(EOPNOTSUPP, "collapse or insert range", &st);
    int op = kind == FALLOC_FL_PUNCH_HOLE ? PUNCH : kind == FALLOC_FL_ZERO_RANGE ? ZERO : ALLOCATE;
    change(slot, &st, fd, at, op == ALLOCATE || length <= 0 ? at : at + length);
    return changed(slot, leave(enter(op, flags, &st, at, length), REAL(fallocate)(fd, mode, at, length)));
}
SEEN int posix_fallocate(int fd, off_t at, off_t length) { /* glibc would write zeros by itself where this fails */
    struct stat st;
    if (!watched(fd, &st)) return REAL(posix_fallocate)(fd, at, length);
    int kept = errno, error = fallocate(fd, 0, at, length) ? errno : 0;
    errno = kept;
    return error;
}
ALSO(fallocate64, fallocate) ALSO(posix_fallocate64, posix_fallocate)

SEEN int fsync(int fd) {
    struct stat st;
    return leave(watched(fd, &st) ? enter(FLUSH, 0, &st, 0, 0) : 0, REAL(fsync)(fd));
}
SEEN int fdatasync(int fd) {
    struct stat st;
    return leave(watched(fd, &st) ? enter(FLUSH, 0, &st, 0, 0) : 0, REAL(fdatasync)(fd));
}
SEEN int syncfs(int fd) {
    struct stat st;
    if (!control) begin();
    return leave(control && !fstat(fd, &st) ? enter(SYNC, 0, &st, 0, 0) : 0, REAL(syncfs)(fd));
}
SEEN void sync(void) {
    if (!control) begin();
    uint64_t entered = control ? enter(SYNC, 0, NULL, 0, 0) : 0;
    REAL(sync)();
    leave(entered, 0);
}
SEEN int sync_file_range(int fd, off_t at, off_t length, unsigned flags) {
    struct stat st;
    return leave(watched(fd, &st) ? enter(RANGE, 0, &st, at, length) : 0, REAL(sync_file_range)(fd, at, length, flags));
}

/* ---- names --------------------------------------------------------------------------------------------------- */

static int opened(int dir, const char *path, int flags, mode_t mode) {
    struct stat st;
    char where[PATH_MAX];
    int unnamed = (flags & O_TMPFILE) == O_TMPFILE, kept = errno;
    if (!unnamed && !(flags & (O_CREAT | O_TRUNC))) return REAL(openat)(dir, path, flags, mode);
    int here = locate(dir, path, where), nofollow = (flags & O_NOFOLLOW) || (~flags & (O_CREAT | O_EXCL)) == 0;
    if (!control) return REAL(openat)(dir, path, flags, mode);
    if (!unnamed && !fstatat(dir, path, &st, nofollow ? AT_SYMLINK_NOFOLLOW : 0) && !S_ISREG(st.st_mode))
        return errno = kept, REAL(openat)(dir, path, flags, mode); /* a fifo's open may wait: hold nothing */
    pthread_mutex_t *held = lock(0);
    int there = !unnamed && !fstatat(dir, path, &st, nofollow ? AT_SYMLINK_NOFOLLOW : 0);
    struct slot *slot = there && (flags & O_TRUNC) ? tracked(&st) : NULL;
    uint64_t entered = 0;
    errno = kept;
    if (slot) change_named(slot, &st, dir, path, 0);
    if (there ? (flags & O_TRUNC) && (here || slot) : here)
        entered = enter_named(OPEN, there ? TRUNCATED : unnamed ? CREATED | UNNAMED : CREATED, there ? &st : NULL, where, "");
    int fd = REAL(openat)(dir, path, flags, mode);
    if (fd >= 0 && (entered || !there) && !fstat(fd, &st)) {
        struct slot *new = entered && S_ISREG(st.st_mode) ? path_of(fd, where), track(&st) : NULL;
        if (new && unnamed) forgo(new, &st, dir, path); /* nobody will find its bytes at the end */
        if (!entered && st.st_nlink == 1) forget(&st);
    }
    leave_as(entered, changed(slot, fd), &st, 0, where);
    unlock(held);
    return fd;
}

#define MODE(flags) ({ va_list list; va_start(list, flags); \
    mode_t mode_ = (flags) & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; va_end(list); mode_; })

SEEN int open(const char *path, int flags, ...) { return opened(AT_FDCWD, path, flags, MODE(flags)); }
SEEN int openat(int dir, const char *path, int flags, ...) { return opened(dir, path, flags, MODE(flags)); }
SEEN int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
SEEN int __open_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
SEEN int __openat_2(int dir, const char *path, int flags) { return opened(dir, path, flags, 0); }
ALSO(open64, open) ALSO(openat64, openat) ALSO(creat64, creat) ALSO(__open64_2, __open_2) ALSO(__openat64_2, __openat_2)

/* Every other change of names: `one` and `other` are its paths, `call` does it. */
#define CHANGE(op, flags, dir, path, dir2, path2, after, call) ({ \
    char one_[PATH_MAX], other_[PATH_MAX]; \
    struct stat st_ = {0}; \
    int here_ = locate(dir, path, one_), there_ = locate(dir2, path2, other_), kept_ = errno; \
    long result_; \
    if (!here_ && !there_) result_ = call; \
    else { \
        pthread_mutex_t *held_ = lock(0); \
        fstatat(dir, path, &st_, AT_SYMLINK_NOFOLLOW); \
        if ((op) == UNLINK) losing(dir, path); \
        else if ((op) == RENAME && (flags) != EXCHANGE) losing(dir2, path2); \
        errno = kept_; \
        uint64_t entered_ = enter_named(op, flags, &st_, one_, other_); \
        result_ = call; \
        if (!result_ && (after) && !fstatat(HERE, *other_ ? other_ : one_, &st_, AT_SYMLINK_NOFOLLOW)) track(&st_); \
        leave_as(entered_, result_, &st_, 0, NULL); \
        unlock(held_); \
    } \
    result_; })
static const char *const NOTHING = NULL;

SEEN int renameat2(int d, const char *a, int d2, const char *b, unsigned how) {
    return CHANGE(RENAME, how & RENAME_EXCHANGE ? EXCHANGE : 0, d, a, d2, b, 0, REAL(renameat2)(d, a, d2, b, how));
}
SEEN int renameat(int d, const char *a, int d2, const char *b) {
    return CHANGE(RENAME, 0, d, a, d2, b, 0, REAL(renameat)(d, a, d2, b));
}
SEEN int rename(const char *a, const char *b) { return renameat(HERE, a, HERE, b); }
SEEN int linkat(int d, const char *a, int d2, const char *b, int how) {
    return CHANGE(LINK, 0, d, a, d2, b, 1, REAL(linkat)(d, a, d2, b, how));
}
SEEN int link(const char *a, const char *b) { return linkat(HERE, a, HERE, b, 0); }
SEEN int symlinkat(const char *to, int d, const char *a) {
    return CHANGE(SYMLINK, 0, d, a, HERE, NOTHING, 0, REAL(symlinkat)(to, d, a));
}
SEEN int symlink(const char *to, const char *a) { return symlinkat(to, HERE, a); }
SEEN int unlinkat(int d, const char *a, int how) {
    return CHANGE(UNLINK, 0, d, a, HERE, NOTHING, 0, REAL(unlinkat)(d, a, how));
}
SEEN int unlink(const char *a) { return unlinkat(HERE, a, 0); }
SEEN int rmdir(const char *a) { return unlinkat(HERE, a, AT_REMOVEDIR); }
SEEN int remove(const char *a) {
    int kept = errno;
    if (!unlink(a)) return 0;
    if (errno != EISDIR && errno != EPERM) return -1;
    errno = kept;
    return rmdir(a);
}
SEEN int mkdirat(int d, const char *a, mode_t mode) {
    return CHANGE(MKDIR, 0, d, a, HERE, NOTHING, 1, REAL(mkdirat)(d, a, mode));
}
SEEN int mkdir(const char *a, mode_t mode) { return mkdirat(HERE, a, mode); }

static int fill(char *template, int suffix, int flags, int directories) {
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
    size_t length = strlen(template);
    if (suffix < 0 || length < (size_t)suffix + 6 || strncmp(template + length - suffix - 6, "XXXXXX", 6))
        return errno = EINVAL, -1;
    for (int tries = 0; tries < 1000; tries++) {
        unsigned char drawn[6];
        if (getentropy(drawn, sizeof drawn)) return -1;
        for (int i = 0; i < 6; i++) template[length - suffix - 6 + i] = letters[drawn[i] % 62];
        int fd = directories ? mkdir(template, 0700) : opened(HERE, template, (flags & ~O_ACCMODE) | O_RDWR | O_CREAT | O_EXCL, 0600);
        if (fd >= 0 || errno != EEXIST) return fd;
    }
    return -1;
}
SEEN int mkostemps(char *template, int suffix, int flags) { return fill(template, suffix, flags, 0); }
SEEN int mkstemps(char *template, int suffix) { return fill(template, suffix, 0, 0); }
SEEN int mkostemp(char *template, int flags) { return fill(template, 0, flags, 0); }
SEEN int mkstemp(char *template) { return fill(template, 0, 0, 0); }
SEEN char *mkdtemp(char *template) { return fill(template, 0, 0, 1) ? NULL : template; }
ALSO(mkostemps64, mkostemps) ALSO(mkstemps64, mkstemps) ALSO(mkostemp64, mkostemp) ALSO(mkstemp64, mkstemp)

/* ---- what would go past the recorder ------------------------------------------------------------------------- */

struct io_uring;
struct io_uring_params;
SEEN int io_uring_queue_init(unsigned entries, struct io_uring *ring, unsigned flags) {
    (void)entries, (void)ring, (void)flags, refuse(ENOSYS, "io_uring", NULL);
    return -ENOSYS;
}
SEEN int io_uring_queue_init_params(unsigned entries, struct io_uring *ring, struct io_uring_params *how) {
    (void)entries, (void)ring, (void)how, refuse(ENOSYS, "io_uring", NULL);
    return -ENOSYS;
}
SEEN int io_setup(unsigned entries, void *context) {
    (void)entries, (void)context, refuse(ENOSYS, "libaio", NULL);
    return -ENOSYS;
}
ALSO(io_queue_init, io_setup)
SEEN int aio_write(void *one) { return (void)one, refuse(ENOSYS, "aio_write", NULL); }
SEEN int aio_fsync(int op, void *one) { return (void)op, (void)one, refuse(ENOSYS, "aio_fsync", NULL); }
SEEN int lio_listio(int mode, void *list, int count, void *how) {
    return (void)mode, (void)list, (void)count, (void)how, refuse(ENOSYS, "lio_listio", NULL);
}
ALSO(aio_write64, aio_write) ALSO(aio_fsync64, aio_fsync) ALSO(lio_listio64, lio_listio)

SEEN long syscall(long number, ...) {
    va_list list;
    long a[6];
    va_start(list, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
    va_end(list);
    switch (number) {
    case SYS_io_uring_setup: return refuse(ENOSYS, "io_uring", NULL);
    case SYS_io_setup: return refuse(ENOSYS, "libaio", NULL);
    case SYS_openat2: return refuse(ENOSYS, "openat2", NULL);
    case SYS_write: return write(a[0], (void *)a[1], a[2]);
    case SYS_writev: return writev(a[0], (void *)a[1], a[2]);
    case SYS_pwrite64: return pwrite(a[0], (void *)a[1], a[2], a[3]);
    case SYS_pwritev: return pwritev(a[0], (void *)a[1], a[2], a[3]);
    case SYS_pwritev2: return pwritev2(a[0], (void *)a[1], a[2], a[3], a[5]);
    case SYS_copy_file_range: return copy_file_range(a[0], (void *)a[1], a[2], (void *)a[3], a[4], a[5]);
    case SYS_sendfile: return sendfile(a[0], a[1], (void *)a[2], a[3]);
    case SYS_splice: return splice(a[0], (void *)a[1], a[2], (void *)a[3], a[4], a[5]);
    case SYS_ftruncate: return ftruncate(a[0], a[1]);
    case SYS_truncate: return truncate((char *)a[0], a[1]);
    case SYS_fallocate: return fallocate(a[0], a[1], a[2], a[3]);
    case SYS_fsync: return fsync(a[0]);
    case SYS_fdatasync: return fdatasync(a[0]);
    case SYS_syncfs: return syncfs(a[0]);
    case SYS_sync_file_range: return sync_file_range(a[0], a[1], a[2], a[3]);
    case SYS_openat: return opened(a[0], (char *)a[1], a[2], a[3]);
    case SYS_renameat2: return renameat2(a[0], (char *)a[1], a[2], (char *)a[3], a[4]);
    case SYS_linkat: return linkat(a[0], (char *)a[1], a[2], (char *)a[3], a[4]);
    case SYS_symlinkat: return symlinkat((char *)a[0], a[1], (char *)a[2]);
    case SYS_unlinkat: return unlinkat(a[0], (char *)a[1], a[2]);
    case SYS_mkdirat: return mkdirat(a[0], (char *)a[1], a[2]);
#ifdef SYS_open
    case SYS_open: return opened(HERE, (char *)a[0], a[1], a[2]);
    case SYS_rename: return rename((char *)a[0], (char *)a[1]);
    case SYS_link: return link((char *)a[0], (char *)a[1]);
    case SYS_unlink: return unlink((char *)a[0]);
    case SYS_rmdir: return rmdir((char *)a[0]);
    case SYS_mkdir: return mkdir((char *)a[0], a[1]);
#endif
    }
    return REAL(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* ---- stdio: glibc writes a stream by itself, so a stream on a recorded file writes through functions of ours ---- */

struct stream { FILE *file; int fd; struct stream *next; };
static struct stream *streams;
static pthread_mutex_t streams_lock = PTHREAD_MUTEX_INITIALIZER;

static ssize_t stream_read(void *cookie, char *to, size_t length) { return read(((struct stream *)cookie)->fd, to, length); }
static ssize_t stream_write(void *cookie, const char *from, size_t length) {
    ssize_t done = write(((struct stream *)cookie)->fd, from, length);
    return done < 0 ? 0 : done; /* as fopencookie asks */
}
static int stream_seek(void *cookie, off64_t *at, int whence) {
    off64_t now = lseek(((struct stream *)cookie)->fd, *at, whence);
    return now < 0 ? -1 : (*at = now, 0);
}
static int stream_close(void *cookie) {
    struct stream *gone = cookie;
    pthread_mutex_lock(&streams_lock);
    for (struct stream **link = &streams; *link; link = &(*link)->next)
        if (*link == gone) {
            *link = gone->next;
            break;
        }
    pthread_mutex_unlock(&streams_lock);
    int result = close(gone->fd);
    free(gone);
    return result;
}

static FILE *stream(int fd, const char *mode) {
    struct stream *new = malloc(sizeof *new);
    FILE *file = new ? fopencookie(new, mode, (cookie_io_functions_t){stream_read, stream_write, stream_seek, stream_close}) : NULL;
    if (!file) return free(new), NULL;
    *new = (struct stream){file, fd, NULL};
    pthread_mutex_lock(&streams_lock);
    new->next = streams, streams = new;
    pthread_mutex_unlock(&streams_lock);
    return file;
}

static int writes(const char *mode) { return mode[0] == 'w' || mode[0] == 'a' || strchr(mode, '+'); }

SEEN FILE *fdopen(int fd, const char *mode) {
    struct stat st;
    if (!writes(mode) || !watched(fd, &st) || !S_ISREG(st.st_mode)) return REAL(fdopen)(fd, mode);
    if (mode[0] == 'a') fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_APPEND);
    return stream(fd, mode);
}
SEEN FILE *fopen(const char *path, const char *mode) {
    if (!writes(mode)) return REAL(fopen)(path, mode);
    int flags = (strchr(mode, '+') ? O_RDWR : O_WRONLY) | (strchr(mode, 'x') ? O_EXCL : 0) | (strchr(mode, 'e') ? O_CLOEXEC : 0);
    flags |= mode[0] == 'r' ? 0 : mode[0] == 'a' ? O_CREAT | O_APPEND : O_CREAT | O_TRUNC;
    int fd = opened(HERE, path, flags, 0666);
    FILE *file = fd < 0 ? NULL : fdopen(fd, mode);
    if (fd >= 0 && !file) close(fd);
    else if (file && mode[0] == 'a') lseek(fd, 0, SEEK_END);
    return file;
}
SEEN FILE *freopen(const char *path, const char *mode, FILE *file) {
    FILE *again = REAL(freopen)(path, mode, file);
    struct stat st;
    if (again && writes(mode) && watched(fileno(again), &st)) enter_named(NOTE, 0, &st, "freopen", "");
    return again;
}
SEEN int vdprintf(int fd, const char *format, va_list list) { /* glibc's own writes past us */
    char *text;
    int length = vasprintf(&text, format, list), done = 0;
    while (length > done) {
        ssize_t more = write(fd, text + done, length - done);
        if (more <= 0) break;
        done += more;
    }
    if (length >= 0) free(text);
    return done < length ? -1 : length;
}
SEEN int __vdprintf_chk(int fd, int flag, const char *format, va_list list) { return (void)flag, vdprintf(fd, format, list); }
SEEN int dprintf(int fd, const char *format, ...) {
    va_list list;
    va_start(list, format);
    int done = vdprintf(fd, format, list);
    va_end(list);
    return done;
}
SEEN int __dprintf_chk(int fd, int flag, const char *format, ...) {
    va_list list;
    va_start(list, format);
    int done = vdprintf(fd, format, list);
    va_end(list);
    return (void)flag, done;
}
SEEN int fileno(FILE *file) {
    int fd = -1;
    pthread_mutex_lock(&streams_lock);
    for (struct stream *one = streams; one && fd < 0; one = one->next)
        if (one->file == file) fd = one->fd;
    pthread_mutex_unlock(&streams_lock);
    return fd >= 0 ? fd : REAL(fileno)(file);
}
ALSO(fopen64, fopen) ALSO(freopen64, freopen) ALSO(fileno_unlocked, fileno)

__attribute__((constructor)) static void redirected(void) { /* the shell may have opened them on a recorded file */
    struct stat st;
    FILE *file;
    if (watched(1, &st) && S_ISREG(st.st_mode) && (file = stream(1, "w"))) stdout = file;
    if (watched(2, &st) && S_ISREG(st.st_mode) && (file = stream(2, "w"))) setvbuf(stderr = file, NULL, _IONBF, 0);
}
