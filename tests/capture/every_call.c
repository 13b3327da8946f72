/* Every way to change a file that the recorder is to see, each once, in the directory that is argv[1]. With argv[2] copies
   inside the kernel are left out. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#include <linux/falloc.h>

#define MUST(call) ({ long r_ = (long)(call); if (r_ < 0) { perror(#call); exit(1); } r_; })

static char block[4096];

static void *fill(char with) { return memset(block, with, sizeof block); }

static void writes(void) {
    int fd = MUST(open("writes", O_RDWR | O_CREAT, 0600));
    MUST(write(fd, fill('a'), 1000));
    struct iovec two[2] = {{fill('b'), 700}, {block, 900}};
    MUST(writev(fd, two, 2));
    MUST(pwrite(fd, fill('c'), 512, 5000));
    MUST(pwritev(fd, two, 2, 9000));
    MUST(pwritev2(fd, two, 1, 12000, RWF_DSYNC));
    MUST(syscall(SYS_pwrite64, fd, fill('d'), 100, 20000));
    MUST(dprintf(fd, "%s %d\n", "formatted", 7));
    int twin = MUST(dup(fd)), third = MUST(dup2(fd, 77));
    MUST(lseek(twin, 30000, SEEK_SET));
    MUST(write(third, fill('e'), 100));
    MUST(write(twin, fill('f'), 100));
    MUST(ftruncate(fd, 40000));
    MUST(truncate("writes", 35000));
    MUST(fsync(fd));
    MUST(sync_file_range(fd, 0, 4096, SYNC_FILE_RANGE_WRITE));
    MUST(fdatasync(fd));
    close(fd), close(twin), close(third);
    int append = MUST(open("writes", O_WRONLY | O_APPEND));
    MUST(write(append, fill('g'), 300));
    MUST(pwrite(append, fill('h'), 300, 0)); /* Linux appends */
    close(append);
    int direct = MUST(open("synced", O_WRONLY | O_CREAT | O_SYNC, 0600));
    MUST(write(direct, fill('i'), 512));
    close(direct);
    direct = MUST(open("synced", O_WRONLY | O_DSYNC));
    MUST(pwrite(direct, fill('j'), 512, 512));
    close(direct);
}

static void allocations(void) {
    int fd = MUST(creat("allocated", 0600));
    MUST(write(fd, fill('k'), 4096)), MUST(write(fd, block, 4096)), MUST(write(fd, block, 4096));
    MUST(fallocate(fd, 0, 0, 20000));
    MUST(fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 60000));
    if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 1000, 5000)) perror("punch");
    if (fallocate(fd, FALLOC_FL_ZERO_RANGE, 8000, 20000)) perror("zero");
    if (posix_fallocate(fd, 0, 50000)) perror("posix_fallocate");
    close(fd);
}

static void copies(void) {
    int in = MUST(open("writes", O_RDONLY)), out = MUST(open("copied", O_RDWR | O_CREAT, 0600));
    off_t from = 100, to = 50;
    MUST(copy_file_range(in, &from, out, &to, 3000, 0));
    if (from != 3100 || to != 3050) exit(2);
    MUST(copy_file_range(in, NULL, out, NULL, 2000, 0));
    if (lseek(in, 0, SEEK_CUR) != 2000 || lseek(out, 0, SEEK_CUR) != 2000) exit(3);
    MUST(sendfile(out, in, NULL, 1000));
    MUST(sendfile(out, in, &from, 1000));
    close(in), close(out);
}

static void streams(void) {
    FILE *file = fopen("stream", "w+");
    fprintf(file, "%d lines of %s\n", 1, "text");
    fputs("and more", file), fputc('!', file);
    fseek(file, 3, SEEK_SET), fwrite("XYZ", 1, 3, file);
    fflush(file);
    MUST(fsync(fileno(file)));
    fclose(file);
    file = fopen("stream", "a");
    for (int i = 0; i < 2000; i++) fprintf(file, "%d,", i);
    fclose(file);
    file = fdopen(MUST(open("stream", O_RDWR)), "r+");
    fwrite("start", 1, 5, file);
    fclose(file);
}

static void names(void) {
    MUST(mkdir("dir", 0700)), MUST(mkdir("gone", 0700)), MUST(rmdir("gone"));
    int dir = MUST(open("dir", O_RDONLY | O_DIRECTORY));
    close(MUST(openat(dir, "one", O_WRONLY | O_CREAT | O_EXCL, 0600)));
    MUST(linkat(dir, "one", dir, "two", 0)), MUST(link("dir/one", "three")), MUST(symlink("dir", "soft"));
    MUST(renameat(dir, "one", AT_FDCWD, "moved"));
    close(MUST(creat("target", 0600))), close(MUST(creat("source", 0600)));
    MUST(rename("source", "target"));
    close(MUST(creat("left", 0600))), close(MUST(creat("right", 0600)));
    if (renameat2(AT_FDCWD, "left", AT_FDCWD, "right", RENAME_EXCHANGE)) perror("exchange");
    close(MUST(creat("unlinked", 0600))), MUST(unlink("unlinked"));
    close(MUST(creat("removed", 0600))), MUST(remove("removed"));
    MUST(rename("dir", "directory"));
    MUST(fsync(dir));
    close(dir);
    char made[] = "temporary.XXXXXX";
    int fd = MUST(mkstemp(made));
    MUST(write(fd, fill('l'), 200));
    MUST(rename(made, "settled"));
    close(fd);
    fd = open(".", O_TMPFILE | O_RDWR, 0600);
    if (fd >= 0) {
        char path[64];
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        MUST(write(fd, fill('m'), 200));
        if (linkat(AT_FDCWD, path, AT_FDCWD, "linked", AT_SYMLINK_FOLLOW)) perror("linkat");
        close(fd);
    }
    fd = MUST(open("orphan", O_RDWR | O_CREAT, 0600));
    MUST(unlink("orphan"));
    MUST(write(fd, fill('n'), 200)); /* a file without a name */
    close(fd);
}

static int shared;

static void *in_thread(void *which) {
    char mine[512];
    memset(mine, 'A' + (int)(long)which, sizeof mine);
    for (int i = 0; i < 50; i++) MUST(pwrite(shared, mine, sizeof mine, (i * 4 + (long)which) * 512));
    MUST(fdatasync(shared));
    return NULL;
}

static void together(void) {
    shared = MUST(open("shared", O_RDWR | O_CREAT, 0600));
    pthread_t threads[3];
    for (long i = 0; i < 3; i++) pthread_create(&threads[i], NULL, in_thread, (void *)i);
    pid_t child = MUST(fork());
    if (!child) in_thread((void *)3L), _exit(0);
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    int status;
    MUST(waitpid(child, &status, 0));
    if (status) exit(4);
    if (system("echo from a shell > said; echo again >> said")) exit(5);
}

int main(int count, char **words) {
    if (count < 2 || chdir(words[1])) return 9;
    writes(), allocations();
    if (count < 3) copies();
    streams(), names(), together();
    puts("to standard output");
    return 0;
}
