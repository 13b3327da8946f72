/*
 * Bytes that are not copied when they are written. Included by recorder.c alone.
 *
 * A large write is lazy if it is alone on its file from its entry to its exit: its checksum is logged, and its bytes are
 * read from the file at the end (powercut/capture/lazy.py). Whatever would destroy lazy bytes - a write over them, a
 * truncation, a hole, the loss of a name - saves them in the log first, as an undo record. A write that another change
 * of its file interrupted logs its bytes when it returns. A process that dies within a change leaves its file as one
 * that is never alone again: whatever is in doubt is copied.
 */
enum { LAZY_FROM = 4096, GRAIN = 4096, GRAINS = 64, BLOCK = GRAIN * GRAINS, PIECE = 64 << 10 };
#define CHANGE_MADE (1ull << 24)        /* `changes` counts those under way below this, and above it all there were */
static const uint64_t ALL = INT64_MAX;  /* the end of every file */

SEEN uint64_t powercut_checksum(const void *data, size_t length) { /* called from Python too */
    static const uint64_t odd = 0x9E3779B97F4A7C15u;
    uint64_t lanes[4] = {length, 1, 2, 3}, sum = 0, words[8];
    for (size_t at = 0; at < length; at += sizeof words) {
        size_t count = length - at < sizeof words ? length - at : sizeof words;
        if (count < sizeof words) memset(words, 0, sizeof words);
        memcpy(words, (const char *)data + at, count);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __uint128_t both = (__uint128_t)(words[2 * i] ^ lanes[i]) * (words[2 * i + 1] ^ odd);
            lanes[i] = (uint64_t)both ^ (uint64_t)(both >> 64);
        }
    }
    for (int i = 0; i < 4; i++) sum = (sum ^ lanes[i]) * odd, sum ^= sum >> 29;
    return sum;
}

/* ---- where lazy bytes are: a bit for 4 KiB of a file, in a table of hashes: too many bits may be set, never too few */

static _Atomic uint64_t *bits_of(const struct slot *slot, uint64_t block) {
    return &control->lazy[(slot->key ^ block * 0x9E3779B97F4A7C15u) % LAZY_WORDS];
}

static uint64_t grains(uint64_t block, uint64_t at, uint64_t end) { /* the bits of a block for a range that meets it */
    uint64_t first = at / GRAIN, last = (end - 1) / GRAIN, base = block * GRAINS;
    return ~0ull << (first > base ? first - base : 0) & ~0ull >> (last < base + 63 ? base + 63 - last : 0);
}

static void set_lazy(struct slot *slot, uint64_t at, uint64_t end) {
    for (uint64_t block = at / BLOCK; block <= (end - 1) / BLOCK; block++)
        atomic_fetch_or(bits_of(slot, block), grains(block, at, end));
    uint64_t old = atomic_load(&slot->lazy_end);
    while (old < end && !atomic_compare_exchange_weak(&slot->lazy_end, &old, end)) {}
}

static void save_piece(int fd, const struct stat *st, uint64_t at, uint64_t length) {
    struct record *record = reserve(sizeof *record + length);
    ssize_t got = record ? pread(fd, record + 1, length, at) : 0; /* into the log itself */
    if (got < 0) fail(errno);
    else if (record) publish(record, SAVED, st, at, length, 0, got);
}

/* Save the lazy bytes of a range, read through `fd`. With fd < 0: only say whether there may be any. */
static int save(int fd, const struct slot *slot, const struct stat *st, uint64_t at, uint64_t end) {
    for (uint64_t block = at / BLOCK; at < end && block <= (end - 1) / BLOCK; block++) {
        uint64_t bits = atomic_load(bits_of(slot, block)) & grains(block, at, end);
        if (bits && fd < 0) return 1;
        while (bits) {
            uint64_t from = block * BLOCK + (uint64_t)__builtin_ctzll(bits) * GRAIN, to = from;
            for (uint64_t bit = bits & -bits; bits & bit && to - from < PIECE; bit <<= 1, to += GRAIN) bits &= ~bit;
            from = from < at ? at : from, to = to > end ? end : to;
            save_piece(fd, st, from, to - from);
        }
    }
    return 0;
}

/* Closing a descriptor gives up all POSIX locks that its process has on the file, so a file that the program has not
 * open for reading is read by a child with descriptors of its own, in the same memory, while the caller waits. */
struct errand { const struct slot *slot; const struct stat *st; int dir; const char *path; uint64_t at, end; };

static int errand(void *argument) {
    struct errand *mine = argument;
    int fd = REAL(openat)(mine->dir, mine->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return fail(errno), 1;
    return save(fd, mine->slot, mine->st, mine->at, mine->end);
}

static void save_apart(struct errand mine) {
    enum { STACK = 256 << 10 };
    if (mine.at >= mine.end || !save(-1, mine.slot, mine.st, mine.at, mine.end)) return;
    sigset_t every, before;
    char *stack = REAL(mmap)(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) return fail(errno);
    sigfillset(&every);
    sigprocmask(SIG_BLOCK, &every, &before); /* no handler of the program runs in the child */
    int child = clone(errand, stack + STACK, CLONE_VM | CLONE_VFORK, &mine);
    if (child < 0) fail(errno);
    else while (waitpid(child, NULL, __WCLONE) < 0 && errno == EINTR) {}
    sigprocmask(SIG_SETMASK, &before, NULL);
    munmap(stack, STACK);
}

/* ---- changes: each begins before the call that makes it, and ends after it --------------------------------------- */

/* The file is never alone again, and all its lazy bytes are saved. */
static void forgo(struct slot *slot, const struct stat *st, int dir, const char *path) {
    int kept = errno;
    atomic_fetch_add(&slot->changes, CHANGE_MADE + 1);
    save_apart((struct errand){slot, st, dir, path, 0, atomic_load(&slot->lazy_end)});
    atomic_store(&slot->lazy_end, 0);
    errno = kept;
}

static void forgo_open(struct slot *slot, const struct stat *st, int fd) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    forgo(slot, st, AT_FDCWD, link);
}

/* A change of a range begins. Returns what `changes` was before, for `alone` and `interrupted`. */
static uint64_t change(struct slot *slot, const struct stat *st, int fd, uint64_t at, uint64_t end) {
    uint64_t before = atomic_fetch_add(&slot->changes, CHANGE_MADE + 1), last = atomic_load(&slot->lazy_end);
    if (at >= last) return before;
    int kept = errno, readable = (fcntl(fd, F_GETFL) & (O_ACCMODE | O_DIRECT)) == O_RDWR;
    if (end > last) end = last;
    if (readable) save(fd, slot, st, at, end);
    else if (at < end && save(-1, slot, st, at, end)) forgo_open(slot, st, fd), before |= 1; /* not alone */
    errno = kept;
    return before;
}

/* The same for a file known by its path, cut off at `at`. */
static void change_named(struct slot *slot, const struct stat *st, int dir, const char *path, uint64_t at) {
    int kept = errno;
    atomic_fetch_add(&slot->changes, CHANGE_MADE + 1);
    save_apart((struct errand){slot, st, dir, path, at, atomic_load(&slot->lazy_end)});
    errno = kept;
}

static long changed(struct slot *slot, long result) { /* it ended; the call's result is passed on */
    if (slot) atomic_fetch_sub(&slot->changes, 1);
    return result;
}

static int alone(uint64_t before) { return !(before % CHANGE_MADE); }
static int interrupted(struct slot *slot, uint64_t before) {
    return atomic_load(&slot->changes) != before + CHANGE_MADE + 1;
}

/* A name is about to go, and what it names perhaps with it. */
static void losing(int dir, const char *path) {
    struct stat st;
    struct slot *slot;
    if (!fstatat(dir, path, &st, AT_SYMLINK_NOFOLLOW) && S_ISREG(st.st_mode) && (slot = tracked(&st)))
        forgo(slot, &st, dir, path);
}
