/* The guest's work: the only process of a small virtual machine, PID 1 of an initramfs.
 *
 * It loads the modules in /modules in the order of their names and then answers commands, one a line, on the
 * virtio-serial port "powercut". Every answer carries the command's tag; requests may be answered in any order.
 *
 *   open TAG D                        find the disk whose serial number is "powercutD"     done TAG 0 SIZE
 *   w TAG D OFFSET LENGTH OP EPOCH    write stamps, direct                                 done TAG ERRNO
 *   f TAG D                           flush                                                done TAG ERRNO
 *   z TAG D OFFSET LENGTH UNMAP       write zeroes                                         done TAG ERRNO
 *   d TAG D OFFSET LENGTH             discard                                              done TAG ERRNO
 *   mount TAG D                       mount the disk's ext4 on /mnt                        done TAG ERRNO
 *   file TAG NAME LENGTH OP           write stamps to a new file, fsync, rename to NAME    done TAG ERRNO
 *   hello TAG                                                                              done TAG 0
 *   poweroff                          flush, unmount, and switch the machine off (as the power button does)
 *   panic                             let the kernel panic
 *
 * Numbers are decimal; offsets and lengths are bytes, multiples of 512. Stamps are those of powercut/stamp.py.
 * Writes and flushes of disks are asynchronous (io_submit) and may overlap; the other commands are not.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/input.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SECTOR = 512, DISKS = 8, IN_FLIGHT = 256, ALIGNED = 4096 };
static const double PATIENCE = 20.0; /* seconds until a disk must be there */

static int port = -1, completions = -1, power = -1;
static int disks[DISKS];
static aio_context_t queue;
static int in_flight;

struct request {
    struct iocb control;
    unsigned long long tag;
    void *data;
};

/* ---- the port ------------------------------------------------------------------------------------------- */

static char said[65536];
static size_t said_length;

static void say_all(void) {
    for (size_t at = 0; at < said_length;) {
        ssize_t n = write(port, said + at, said_length - at);
        if (n > 0)
            at += n;
        else if (errno != EINTR && errno != EAGAIN)
            break;
    }
    said_length = 0;
}

static void done(unsigned long long tag, long error, unsigned long long size) {
    if (said_length > sizeof said - 100)
        say_all();
    said_length += size ? sprintf(said + said_length, "done %llu %ld %llu\n", tag, error, size)
                        : sprintf(said + said_length, "done %llu %ld\n", tag, error);
}

/* ---- stamps --------------------------------------------------------------------------------------------- */

static uint64_t fold(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* xxh3-64 of 24 bytes, seed 0 (xxHash specification, XXH3, 17 to 128 bytes) */
static uint64_t digest(uint64_t op, uint64_t epoch, uint64_t sector) {
    uint64_t value = 24 * 0x9E3779B185EBCA87ull;
    value += fold(op ^ 0xBE4BA423396CFEB8ull, epoch ^ 0x1CAD21F72C81017Cull);
    value += fold(epoch ^ 0xDB979083E96DD4DEull, sector ^ 0x1F67B3B7A4A44072ull);
    value = (value ^ value >> 37) * 0x165667919E3779F9ull;
    return value ^ value >> 32;
}

static void stamp(uint64_t *to, uint64_t length, uint64_t op, uint64_t epoch, uint64_t sector) {
    for (; length; length -= SECTOR, sector++) {
        uint64_t words[4] = {op, epoch, sector, digest(op, epoch, sector)};
        for (int i = 0; i < SECTOR / 32; i++, to += 4)
            memcpy(to, words, 32);
    }
}

/* ---- disks ---------------------------------------------------------------------------------------------- */

static int holds(const char *path, const char *word) {
    char text[512];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t n = read(fd, text, sizeof text);
    close(fd);
    return n > 0 && memmem(text, n, word, strlen(word)) != NULL;
}

/* The path of the block device with that serial number, wherever its driver shows it. */
static int find(int disk, char *path, size_t size) {
    static const char *places[] = {"serial", "device/serial", "device/vpd_pg80"};
    char serial[32], place[512];
    int found = 0;
    snprintf(serial, sizeof serial, "powercut%d", disk);
    DIR *folder = opendir("/sys/block");
    for (struct dirent *entry; folder && !found && (entry = readdir(folder));)
        for (int i = 0; i < 3 && !found; i++) {
            snprintf(place, sizeof place, "/sys/block/%s/%s", entry->d_name, places[i]);
            found = holds(place, serial);
            snprintf(path, size, "/dev/%s", entry->d_name);
        }
    if (folder)
        closedir(folder);
    return found;
}

/* Open a disk that may still be appearing: its name is there a little before the device answers. */
static int open_soon(int disk, int flags) {
    char path[300];
    int fd = -1;
    errno = ENODEV;
    for (double waited = 0; waited < PATIENCE; waited += 0.002) {
        if (find(disk, path, sizeof path) && (fd = open(path, flags | O_CLOEXEC)) >= 0)
            break;
        usleep(2000);
    }
    return fd;
}

static void open_disk(unsigned long long tag, int disk) {
    unsigned long long size = 0;
    if (disk < 0 || disk >= DISKS) {
        done(tag, EINVAL, 0);
        return;
    }
    if (disks[disk] < 0) /* it may be open since before the machine was restored */
        disks[disk] = open_soon(disk, O_RDWR | O_DIRECT);
    if (disks[disk] < 0 || ioctl(disks[disk], BLKGETSIZE64, &size) < 0)
        done(tag, errno, 0);
    else
        done(tag, 0, size);
}

static void submit(unsigned long long tag, int disk, int opcode, unsigned long long offset, unsigned long long length,
                   unsigned long long op, unsigned long long epoch) {
    struct request *request = calloc(1, sizeof *request);
    struct iocb *control = &request->control;
    request->tag = tag;
    if (length && posix_memalign(&request->data, ALIGNED, length)) {
        done(tag, ENOMEM, 0);
        free(request);
        return;
    }
    if (length)
        stamp(request->data, length, op, epoch, offset / SECTOR);
    control->aio_data = (uintptr_t)request;
    control->aio_lio_opcode = opcode;
    control->aio_fildes = disks[disk];
    control->aio_buf = (uintptr_t)request->data;
    control->aio_nbytes = length;
    control->aio_offset = offset;
    control->aio_flags = IOCB_FLAG_RESFD;
    control->aio_resfd = completions;
    while (syscall(SYS_io_submit, queue, 1L, &control) < 0) {
        if (errno == EAGAIN || errno == EINTR)
            continue;
        done(tag, errno, 0);
        free(request->data);
        free(request);
        return;
    }
    in_flight++;
}

/* Answer what has completed, after waiting for at least `least`. */
static void reap(long least) {
    struct io_event events[IN_FLIGHT];
    int n = syscall(SYS_io_getevents, queue, least, (long)IN_FLIGHT, events, NULL);
    for (int i = 0; i < n; i++) {
        struct request *request = (struct request *)(uintptr_t)events[i].data;
        long result = (long)events[i].res, wanted = (long)request->control.aio_nbytes;
        done(request->tag, result < 0 ? -result : result < wanted ? EIO : 0, 0);
        free(request->data);
        free(request);
    }
    in_flight -= n < 0 ? 0 : n;
}

static void deallocate(unsigned long long tag, int disk, int mode, unsigned long long offset, unsigned long long length) {
    int failed;
    if (mode >= 0)
        failed = fallocate(disks[disk], mode | FALLOC_FL_KEEP_SIZE, offset, length) < 0;
    else
        failed = ioctl(disks[disk], BLKDISCARD, (uint64_t[]){offset, length}) < 0;
    done(tag, failed ? errno : 0, 0);
}

/* ---- files ---------------------------------------------------------------------------------------------- */

static void mount_disk(unsigned long long tag, int disk) {
    char path[300];
    int fd = open_soon(disk, O_RDONLY);
    int failed = fd < 0 || !find(disk, path, sizeof path) || mount(path, "/mnt", "ext4", 0, NULL) < 0;
    done(tag, failed ? errno : 0, 0);
    if (fd >= 0)
        close(fd);
}

static int write_file(const char *name, unsigned long long length, unsigned long long op) {
    char final[160];
    uint64_t *data = malloc(length);
    int file = open("/mnt/new", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644), folder = -1;
    int failed = !data || file < 0;
    snprintf(final, sizeof final, "/mnt/%s", name);
    if (!failed) {
        stamp(data, length, op, 0, 0);
        for (unsigned long long at = 0; at < length && !failed;) {
            ssize_t n = write(file, (char *)data + at, length - at);
            failed = n < 0 && errno != EINTR;
            at += n > 0 ? n : 0;
        }
    }
    failed = failed || fsync(file) < 0 || rename("/mnt/new", final) < 0;
    failed = failed || (folder = open("/mnt", O_RDONLY | O_CLOEXEC)) < 0 || fsync(folder) < 0;
    int error = failed ? errno : 0;
    free(data);
    if (file >= 0)
        close(file);
    if (folder >= 0)
        close(folder);
    return error;
}

/* ---- the machine ---------------------------------------------------------------------------------------- */

static void load_modules(void) {
    struct dirent **entries;
    int count = scandir("/modules", &entries, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        char path[300];
        snprintf(path, sizeof path, "/modules/%s", entries[i]->d_name);
        int fd = entries[i]->d_name[0] == '.' ? -1 : open(path, O_RDONLY | O_CLOEXEC);
        if (fd >= 0 && syscall(SYS_finit_module, fd, "", 0) < 0)
            fprintf(stderr, "agent: %s: %s\n", entries[i]->d_name, strerror(errno));
        if (fd >= 0)
            close(fd);
    }
}

/* The descriptor of the port called "powercut". */
static int open_port(void) {
    for (;; usleep(2000))
        for (int i = 0; i < 16; i++) {
            char path[100];
            snprintf(path, sizeof path, "/sys/class/virtio-ports/vport%dp1/name", i);
            if (!holds(path, "powercut"))
                continue;
            snprintf(path, sizeof path, "/dev/vport%dp1", i);
            int fd = open(path, O_RDWR | O_CLOEXEC);
            if (fd >= 0)
                return fd;
        }
}

static int open_power_button(void) {
    for (int i = 0; i < 8; i++) {
        char path[64], name[64] = "";
        snprintf(path, sizeof path, "/dev/input/event%d", i);
        int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (fd >= 0 && ioctl(fd, EVIOCGNAME(sizeof name - 1), name) >= 0 && !strcmp(name, "Power Button"))
            return fd;
        if (fd >= 0)
            close(fd);
    }
    return -1;
}

static void power_off(void) {
    while (in_flight > 0)
        reap(1);
    for (int i = 0; i < DISKS; i++)
        if (disks[i] >= 0)
            fsync(disks[i]);
    sync();
    umount("/mnt");
    say_all();
    reboot(RB_POWER_OFF);
}

static void panic(void) {
    int fd = open("/proc/sysrq-trigger", O_WRONLY);
    if (fd < 0 || write(fd, "c", 1) < 0)
        perror("agent: panic");
}

static void obey(const char *line) {
    unsigned long long tag, offset = 0, length = 0, op = 0, epoch = 0;
    char name[128];
    int disk = 0;
    if (sscanf(line, "w %llu %d %llu %llu %llu %llu", &tag, &disk, &offset, &length, &op, &epoch) == 6)
        submit(tag, disk, IOCB_CMD_PWRITE, offset, length, op, epoch);
    else if (sscanf(line, "f %llu %d", &tag, &disk) == 2)
        submit(tag, disk, IOCB_CMD_FSYNC, 0, 0, 0, 0);
    else if (sscanf(line, "z %llu %d %llu %llu %llu", &tag, &disk, &offset, &length, &op) == 5)
        deallocate(tag, disk, op ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE, offset, length);
    else if (sscanf(line, "d %llu %d %llu %llu", &tag, &disk, &offset, &length) == 4)
        deallocate(tag, disk, -1, offset, length);
    else if (sscanf(line, "open %llu %d", &tag, &disk) == 2)
        open_disk(tag, disk);
    else if (sscanf(line, "mount %llu %d", &tag, &disk) == 2)
        mount_disk(tag, disk);
    else if (sscanf(line, "file %llu %100s %llu %llu", &tag, name, &length, &op) == 4)
        done(tag, write_file(name, length, op), 0);
    else if (sscanf(line, "hello %llu", &tag) == 1)
        done(tag, 0, 0);
    else if (!strcmp(line, "poweroff"))
        power_off();
    else if (!strcmp(line, "panic"))
        panic();
    else
        fprintf(stderr, "agent: not understood: %s\n", line);
}

/* Take what has come on the port and obey every whole line of it. */
static void listen_once(void) {
    static char heard[65536];
    static size_t length;
    ssize_t n = read(port, heard + length, sizeof heard - 1 - length);
    if (n <= 0) { /* nobody at the other end */
        usleep(1000);
        return;
    }
    length += n;
    char *line = heard, *end;
    while ((end = memchr(line, '\n', heard + length - line))) {
        *end = 0;
        obey(line);
        line = end + 1;
    }
    length -= line - heard;
    memmove(heard, line, length);
}

int main(void) {
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    memset(disks, -1, sizeof disks);
    load_modules();
    syscall(SYS_io_setup, IN_FLIGHT, &queue);
    completions = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    port = open_port();
    power = open_power_button();
    for (;;) {
        struct pollfd waiting[] = {{port, POLLIN, 0}, {completions, POLLIN, 0}, {power, POLLIN, 0}};
        if (poll(waiting, 3, -1) < 0)
            continue;
        if (waiting[0].revents)
            listen_once();
        if (waiting[1].revents) {
            uint64_t count;
            if (read(completions, &count, sizeof count) > 0)
                reap(0);
        }
        if (waiting[2].revents) {
            struct input_event event;
            while (read(power, &event, sizeof event) == sizeof event)
                if (event.type == EV_KEY && event.code == KEY_POWER && event.value)
                    power_off();
        }
        say_all();
    }
}
