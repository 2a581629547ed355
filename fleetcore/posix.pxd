# C0: every extern of libc and of the compiler, with a stand-in where a system lacks one. Only declarations and one-line
# shims: `static inline`, no state.
from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <poll.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <sys/socket.h>
    #include <sys/stat.h>
    #include <sys/types.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>
    #if defined(__linux__)
    #include <linux/futex.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #elif defined(__APPLE__)
    #include <sys/event.h>
    #endif

    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "frames and shared memory are little-endian"
    #endif

    #ifndef MAP_NORESERVE
    #define MAP_NORESERVE 0
    #endif
    #ifndef MSG_NOSIGNAL
    #define MSG_NOSIGNAL 0      /* macOS: SO_NOSIGPIPE is set on the socket instead */
    #endif

    static inline int64_t fc_now_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    }

    static inline int fc_floor_log2(uint64_t n) { return 63 - __builtin_clzll(n); }    /* n > 0 */

    static inline void fc_pause(void) {
    #if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
    #elif defined(__aarch64__)
        __asm__ __volatile__("isb" ::: "memory");   /* yield is a no-op on most cores; isb waits some 10 ns */
    #endif
    }

    /* Shared words: acquire/release where one side publishes data, sequentially consistent where two flags cross. */
    static inline uint64_t fc_load64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline uint32_t fc_load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void fc_store64(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline void fc_store32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline uint32_t fc_add32(uint32_t *p, uint32_t v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
    static inline int fc_cas32(uint32_t *p, uint32_t old, uint32_t v) {
        return __atomic_compare_exchange_n(p, &old, v, 0, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE);
    }
    static inline void *fc_swap_pointer(void **p, void *v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
    static inline int fc_cas_pointer(void **p, void *old, void *v) {
        return __atomic_compare_exchange_n(p, &old, v, 0, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE);
    }
    static inline void fc_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

    /* Sleep while *word == seen, at most ns; returns early for any reason. Shared between processes. */
    #if defined(__linux__)
    static inline void fc_futex_wait(uint32_t *word, uint32_t seen, int64_t ns) {
        struct timespec t = { .tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000 };
        syscall(SYS_futex, word, FUTEX_WAIT, seen, &t, NULL, 0);
    }
    static inline void fc_futex_wake(uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0); }
    #elif defined(__APPLE__)
    /* The calls under libc++'s atomic wait; 3 = compare-and-wait on memory shared between processes. */
    extern int __ulock_wait(uint32_t operation, void *address, uint64_t value, uint32_t timeout_us);
    extern int __ulock_wake(uint32_t operation, void *address, uint64_t value);
    static inline void fc_futex_wait(uint32_t *word, uint32_t seen, int64_t ns) {
        __ulock_wait(3, word, seen, (uint32_t)(ns / 1000 + 1));
    }
    static inline void fc_futex_wake(uint32_t *word) { __ulock_wake(3 | 0x100, word, 0); }   /* 0x100: all waiters */
    #else
    static inline void fc_futex_wait(uint32_t *word, uint32_t seen, int64_t ns) {
        struct timespec t = { .tv_sec = 0, .tv_nsec = ns < 50000 ? ns : 50000 };
        if (__atomic_load_n(word, __ATOMIC_ACQUIRE) == seen) nanosleep(&t, NULL);
    }
    static inline void fc_futex_wake(uint32_t *word) { (void)word; }
    #endif

    /* An unnamed shared file: gone with its last descriptor, so a killed process leaks nothing. */
    static inline int fc_memory_fd(size_t nbytes) {
        int fd;
    #if defined(__linux__)
        fd = (int)syscall(SYS_memfd_create, "pyfleet", 1u /* MFD_CLOEXEC */);
    #else
        char name[32];
        static int serial;
        snprintf(name, sizeof name, "/pyfleet.%d.%d", (int)getpid(), serial++);
        fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
        if (fd >= 0) { shm_unlink(name); fcntl(fd, F_SETFD, FD_CLOEXEC); }
    #endif
        if (fd >= 0 && ftruncate(fd, (off_t)nbytes) != 0) { int e = errno; close(fd); errno = e; fd = -1; }
        return fd;
    }

    /* Advice only; every failure is harmless. */
    static inline void fc_advise(void *base, size_t nbytes) {
    #if defined(__linux__)
        madvise(base, nbytes, MADV_HUGEPAGE);
        madvise(base, nbytes, MADV_DONTDUMP);
    #else
        (void)base; (void)nbytes;
    #endif
    }
    /* Back a range by huge pages now, also where the system does not give them to shared memory by itself. */
    static inline void fc_enlarge_pages(void *base, size_t nbytes) {
    #if defined(__linux__)
    #ifndef MADV_COLLAPSE
    #define MADV_COLLAPSE 25        /* Linux 6.1 */
    #endif
        /* It wants at least one page to be there in each. */
        for (size_t at = 0; at < nbytes; at += 2u << 20) (void)*((volatile char *)base + at);
        madvise(base, nbytes, MADV_COLLAPSE);
    #else
        (void)base; (void)nbytes;
    #endif
    }
    static inline void fc_discard(void *base, size_t nbytes) {       /* give pages back; they read as zero afterwards */
    #if defined(__linux__)
        madvise(base, nbytes, MADV_REMOVE);
    #else
        (void)base; (void)nbytes;
    #endif
    }

    /* Read another process's memory; -1 with errno where the system has no such call or forbids it. */
    static inline ssize_t fc_read_process(int pid, void *dst, uint64_t address, size_t nbytes) {
    #if defined(__linux__)
        struct iovec local = { dst, nbytes }, remote = { (void *)(uintptr_t)address, nbytes };
        return syscall(SYS_process_vm_readv, (pid_t)pid, &local, 1ul, &remote, 1ul, 0ul);
    #else
        (void)pid; (void)dst; (void)address; (void)nbytes;
        errno = ENOSYS;
        return -1;
    #endif
    }
    /* Where Yama restricts it to descendants, let a sibling read this process. */
    static inline void fc_allow_reads(void) {
    #if defined(__linux__) && defined(PR_SET_PTRACER)
        prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
    #endif
    }
    static inline int fc_open_process(int pid) {       /* becomes readable when the process ends; -1 where unknown */
    #if defined(__linux__)
    #ifndef SYS_pidfd_open
    #define SYS_pidfd_open 434
    #endif
        return (int)syscall(SYS_pidfd_open, (pid_t)pid, 0u);
    #elif defined(__APPLE__)
        struct kevent event;
        int queue = kqueue();
        EV_SET(&event, pid, EVFILT_PROC, EV_ADD, NOTE_EXIT, 0, NULL);
        if (queue >= 0 && kevent(queue, &event, 1, NULL, 0, NULL) != 0) { close(queue); queue = -1; }
        return queue;
    #else
        (void)pid;
        errno = ENOSYS;
        return -1;
    #endif
    }
    static inline int fc_errno(void) { return errno; }
    """
    int64_t now_ns "fc_now_ns"() noexcept nogil
    int floor_log2 "fc_floor_log2"(uint64_t n) noexcept nogil
    void cpu_pause "fc_pause"() noexcept nogil
    uint64_t load64 "fc_load64"(const uint64_t *p) noexcept nogil
    uint32_t load32 "fc_load32"(const uint32_t *p) noexcept nogil
    void store64 "fc_store64"(uint64_t *p, uint64_t v) noexcept nogil
    void store32 "fc_store32"(uint32_t *p, uint32_t v) noexcept nogil
    uint32_t add32 "fc_add32"(uint32_t *p, uint32_t v) noexcept nogil
    int cas32 "fc_cas32"(uint32_t *p, uint32_t old, uint32_t v) noexcept nogil
    void *swap_pointer "fc_swap_pointer"(void **p, void *v) noexcept nogil
    int cas_pointer "fc_cas_pointer"(void **p, void *old, void *v) noexcept nogil
    void fence "fc_fence"() noexcept nogil
    void futex_wait "fc_futex_wait"(uint32_t *word, uint32_t seen, int64_t ns) noexcept nogil
    void futex_wake "fc_futex_wake"(uint32_t *word) noexcept nogil
    int memory_fd "fc_memory_fd"(size_t nbytes) noexcept nogil
    void advise "fc_advise"(void *base, size_t nbytes) noexcept nogil
    void enlarge_pages "fc_enlarge_pages"(void *base, size_t nbytes) noexcept nogil
    void discard "fc_discard"(void *base, size_t nbytes) noexcept nogil
    Py_ssize_t read_process "fc_read_process"(int pid, void *dst, uint64_t address, size_t nbytes) noexcept nogil
    void allow_reads "fc_allow_reads"() noexcept nogil
    int open_process "fc_open_process"(int pid) noexcept nogil
    int last_errno "fc_errno"() noexcept nogil

    void *memcpy(void *dst, const void *src, size_t n) noexcept nogil
    void *memmove(void *dst, const void *src, size_t n) noexcept nogil
    void *memset(void *dst, int value, size_t n) noexcept nogil
    int memcmp(const void *a, const void *b, size_t n) noexcept nogil
    void *malloc(size_t n) noexcept nogil
    void *calloc(size_t n, size_t size) noexcept nogil
    void *realloc(void *p, size_t n) noexcept nogil
    int posix_memalign(void **out, size_t alignment, size_t n) noexcept nogil
    void free(void *p) noexcept nogil

    void *mmap(void *address, size_t n, int protection, int flags, int fd, int64_t offset) noexcept nogil
    int munmap(void *address, size_t n) noexcept nogil
    int close(int fd) noexcept nogil
    int dup(int fd) noexcept nogil
    int getpid() noexcept nogil
    enum: PROT_NONE, PROT_READ, PROT_WRITE, MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE
    void *MAP_FAILED

    struct iovec:
        void *iov_base
        size_t iov_len
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    struct pollfd:
        int fd
        short events
        short revents
    Py_ssize_t sendmsg(int fd, const msghdr *m, int flags) noexcept nogil
    Py_ssize_t recvmsg(int fd, msghdr *m, int flags) noexcept nogil
    int poll(pollfd *fds, unsigned long n, int timeout_ms) noexcept nogil
    int shutdown(int fd, int how) noexcept nogil
    enum: MSG_NOSIGNAL, MSG_DONTWAIT, POLLIN, POLLOUT, POLLERR, POLLHUP, SHUT_RDWR, SOL_SOCKET, SO_RCVLOWAT
    int setsockopt(int fd, int level, int name, const void *value, unsigned int length) nogil
    enum: EAGAIN, EINTR, EINVAL, EPERM, ESRCH, ENOSYS, EFAULT, ECONNRESET, EPIPE
