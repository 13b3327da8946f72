/* Control: a disk that loses what operation 2 of a guest wrote, and says that all went well. Preloaded into QEMU. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>

static int lost(const void *data, size_t length) {
    uint64_t operation; /* a stamp begins with its number */
    if (length < 512)
        return 0;
    memcpy(&operation, data, sizeof operation);
    return operation == 2;
}

ssize_t pwrite64(int file, const void *data, size_t length, off_t offset) {
    static ssize_t (*next)(int, const void *, size_t, off_t);
    if (!next)
        next = dlsym(RTLD_NEXT, "pwrite64");
    return lost(data, length) ? (ssize_t)length : next(file, data, length, offset);
}

ssize_t pwritev64(int file, const struct iovec *parts, int count, off_t offset) {
    static ssize_t (*next)(int, const struct iovec *, int, off_t);
    ssize_t length = 0;
    if (!next)
        next = dlsym(RTLD_NEXT, "pwritev64");
    for (int part = 0; part < count; part++)
        length += parts[part].iov_len;
    return count && lost(parts[0].iov_base, parts[0].iov_len) ? length : next(file, parts, count, offset);
}
