/* The bound for broadcasts: a thread that reads messages from standard input and calls send() for each connection.
 *
 * The main thread accepts, and answers each client's first byte with the same byte. Prints the port that the kernel
 * chose, listens on 127.0.0.1 only, runs until it is killed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MOST = 65536 };

static int members[MOST], count; /* guarded by `lock` */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void *send_to_all(void *unused) {
    char message[65536];
    ssize_t size;

    while ((size = read(STDIN_FILENO, message, sizeof message)) > 0) {
        pthread_mutex_lock(&lock);
        for (int i = 0; i < count; i++)
            if (send(members[i], message, (size_t)size, MSG_NOSIGNAL) != size)
                die("send");
        pthread_mutex_unlock(&lock);
    }
    return unused;
}

static void add_member(int fd) {
    int one = 1;
    char hello;

    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    pthread_mutex_lock(&lock);
    if (count == MOST)
        die("too many connections");
    members[count++] = fd;
    pthread_mutex_unlock(&lock);
    if (recv(fd, &hello, 1, 0) != 1 || send(fd, &hello, 1, MSG_NOSIGNAL) != 1)
        die("hello");
}

int main(void) {
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof addr;
    struct rlimit lim;
    pthread_t thread;
    int fd, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (getrlimit(RLIMIT_NOFILE, &lim) == 0) {
        lim.rlim_cur = lim.rlim_max;
        setrlimit(RLIMIT_NOFILE, &lim);
    }
    if (listener < 0 || bind(listener, (struct sockaddr *)&addr, len) == -1 || listen(listener, 4096) == -1 ||
        getsockname(listener, (struct sockaddr *)&addr, &len) == -1)
        die("listen");
    printf("%d\n", ntohs(addr.sin_port));
    fflush(stdout);
    if (pthread_create(&thread, NULL, send_to_all, NULL) != 0)
        die("pthread_create");
    while ((fd = accept(listener, NULL, NULL)) >= 0)
        add_member(fd);
    die("accept");
}
