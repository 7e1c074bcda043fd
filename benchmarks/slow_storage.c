/* A folder passed through with FUSE, read only, every read of data delayed and counted: slow storage for benchmarks.
 *
 *     slow_storage FOLDER MOUNT CONTROL
 *
 * CONTROL is a file of three 64-bit numbers, mapped and shared: microseconds a read costs (written by the benchmark),
 * reads and bytes so far (written here). Ends when MOUNT is unmounted. Reads of the kernel are at most 1 MiB, and up to
 * THREADS of them run at once, as storage across a network answers: late, but to many at a time. Page faults of
 * mappings and the kernel's read-ahead come here as reads too.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 64, NODES = 4096, READ_NBYTES = 1 << 20, REQUEST_NBYTES = READ_NBYTES + (1 << 16) };

struct control {
    volatile uint64_t delay_us;
    uint64_t reads, nbytes;
};

static int device;
static struct control *control;
static char *paths[NODES]; /* by node number; FUSE_ROOT_ID is the folder */
static unsigned nodes = FUSE_ROOT_ID + 1;
static pthread_mutex_t naming = PTHREAD_MUTEX_INITIALIZER;

static void answer(uint64_t unique, int error, const void *data, size_t nbytes) {
    struct fuse_out_header head = {sizeof head + (error ? 0 : nbytes), -error, unique};
    struct iovec parts[2] = {{&head, sizeof head}, {(void *)data, nbytes}};
    if (writev(device, parts, error || !nbytes ? 1 : 2) < 0 && errno != ENOENT)
        perror("answer");
}

static uint64_t node_of(const char *path) {
    unsigned node;
    pthread_mutex_lock(&naming);
    for (node = FUSE_ROOT_ID; node < nodes && strcmp(paths[node], path); node++)
        ;
    if (node == nodes && nodes < NODES)
        paths[nodes++] = strdup(path);
    pthread_mutex_unlock(&naming);
    return node < NODES ? node : 0;
}

static int attributes(const char *path, uint64_t node, struct fuse_attr *attr) {
    struct stat found;
    if (stat(path, &found))
        return errno;
    memset(attr, 0, sizeof *attr);
    attr->ino = node;
    attr->size = found.st_size;
    attr->blocks = found.st_blocks;
    attr->mode = found.st_mode;
    attr->nlink = 1;
    attr->blksize = 4096;
    attr->mtime = found.st_mtime;
    return 0;
}

static void look_up(uint64_t unique, uint64_t parent, const char *name) {
    char path[4096];
    struct fuse_entry_out out = {0};
    snprintf(path, sizeof path, "%s/%s", paths[parent], name);
    int error = attributes(path, 0, &out.attr);
    if (!error && !(out.nodeid = node_of(path)))
        error = ENFILE;
    out.attr.ino = out.nodeid;
    out.entry_valid = out.attr_valid = 3600;
    answer(unique, error, &out, sizeof out);
}

static void list(uint64_t unique, uint64_t node, const struct fuse_read_in *in) {
    char out[1 << 16];
    size_t used = 0;
    uint64_t place = 0;
    DIR *folder = opendir(paths[node]);
    struct dirent *entry;
    while (folder && (entry = readdir(folder))) {
        size_t length = strlen(entry->d_name), nbytes = FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + length);
        if (place++ < in->offset)
            continue;
        if (used + nbytes > in->size || used + nbytes > sizeof out)
            break;
        struct fuse_dirent *made = (struct fuse_dirent *)(out + used);
        memset(made, 0, nbytes);
        made->ino = entry->d_ino;
        made->off = place;
        made->namelen = length;
        made->type = entry->d_type;
        memcpy(made->name, entry->d_name, length);
        used += nbytes;
    }
    if (folder)
        closedir(folder);
    answer(unique, folder ? 0 : ENOENT, out, used);
}

static void read_data(uint64_t unique, const struct fuse_read_in *in, char *buffer) {
    uint64_t delay = control->delay_us;
    struct timespec pause = {delay / 1000000, delay % 1000000 * 1000};
    nanosleep(&pause, NULL);
    ssize_t count = pread((int)in->fh, buffer, in->size, in->offset);
    if (count > 0) {
        __atomic_fetch_add(&control->reads, 1, __ATOMIC_RELAXED);
        __atomic_fetch_add(&control->nbytes, count, __ATOMIC_RELAXED);
    }
    answer(unique, count < 0 ? errno : 0, buffer, count < 0 ? 0 : count);
}

static void begin(uint64_t unique, const struct fuse_init_in *in) {
    struct fuse_init_out out = {
        .major = FUSE_KERNEL_VERSION,
        .minor = FUSE_KERNEL_MINOR_VERSION,
        .max_readahead = in->max_readahead,
        .flags = in->flags & (FUSE_ASYNC_READ | FUSE_ASYNC_DIO | FUSE_MAX_PAGES | FUSE_PARALLEL_DIROPS),
        .max_background = THREADS,
        .congestion_threshold = THREADS,
        .max_write = READ_NBYTES,
        .max_pages = READ_NBYTES / 4096,
        .time_gran = 1,
    };
    answer(unique, 0, &out, sizeof out);
}

static void serve(const struct fuse_in_header *head, const void *body, char *buffer) {
    uint64_t unique = head->unique, node = head->nodeid;
    union {
        struct fuse_attr_out attr;
        struct fuse_open_out open;
        struct fuse_statfs_out statfs;
    } out = {0};
    int error = 0;
    switch (head->opcode) {
    case FUSE_INIT:
        begin(unique, body);
        return;
    case FUSE_LOOKUP:
        look_up(unique, node, body);
        return;
    case FUSE_GETATTR:
        out.attr.attr_valid = 3600;
        error = attributes(paths[node], node, &out.attr.attr);
        answer(unique, error, &out, sizeof out.attr);
        return;
    case FUSE_OPEN: {
        int file = open(paths[node], O_RDONLY);
        error = file < 0 ? errno : 0;
        out.open.fh = file;
        out.open.open_flags = FOPEN_KEEP_CACHE; /* the page cache is shared by all processes, as NFS and Lustre do */
        answer(unique, error, &out, sizeof out.open);
        return;
    }
    case FUSE_OPENDIR:
        answer(unique, 0, &out, sizeof out.open);
        return;
    case FUSE_READ:
        read_data(unique, body, buffer);
        return;
    case FUSE_READDIR:
        list(unique, node, body);
        return;
    case FUSE_RELEASE:
        close((int)((const struct fuse_release_in *)body)->fh);
        answer(unique, 0, NULL, 0);
        return;
    case FUSE_RELEASEDIR:
    case FUSE_FLUSH:
        answer(unique, 0, NULL, 0);
        return;
    case FUSE_STATFS:
        out.statfs.st.bsize = out.statfs.st.frsize = 4096;
        out.statfs.st.namelen = 255;
        answer(unique, 0, &out, sizeof out.statfs);
        return;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
        return; /* these want no answer */
    default:
        answer(unique, ENOSYS, NULL, 0);
    }
}

static void *work(void *nothing) {
    char *request = malloc(REQUEST_NBYTES), *buffer = malloc(READ_NBYTES);
    for (;;) {
        ssize_t count = read(device, request, REQUEST_NBYTES);
        if (count >= (ssize_t)sizeof(struct fuse_in_header))
            serve((void *)request, request + sizeof(struct fuse_in_header), buffer);
        else if (count < 0 && errno == ENODEV)
            return nothing; /* unmounted */
        else if (count < 0 && errno != EINTR && errno != ENOENT && errno != EAGAIN)
            exit((perror("read"), 1));
    }
}

int main(int count, char **words) {
    pthread_t threads[THREADS];
    char options[128];
    int file = count == 4 ? open(words[3], O_RDWR) : -1;
    control = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (control == MAP_FAILED || (device = open("/dev/fuse", O_RDWR)) < 0)
        exit((perror("slow_storage FOLDER MOUNT CONTROL"), 1));
    paths[FUSE_ROOT_ID] = words[1];
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=%d,group_id=%d,allow_other,max_read=%d", device,
             getuid(), getgid(), READ_NBYTES);
    if (mount("slow_storage", words[2], "fuse.slow_storage", MS_NOSUID | MS_NODEV | MS_RDONLY, options))
        exit((perror("mount"), 1));
    for (int number = 0; number < THREADS; number++)
        pthread_create(&threads[number], NULL, work, NULL);
    for (int number = 0; number < THREADS; number++)
        pthread_join(threads[number], NULL);
    return 0;
}
