/*
 * A guest program that puts the agent's vsock port behind the virtio-serial port of its name, for hosts that have no
 * vsock: the host then speaks with an agent that listens on vsock.
 *
 *   relay   relays until the machine ends
 *
 * Each time the host comes anew, so does the connection to the agent.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { AGENT_PORT = 2222, LOCAL = 1 };
#define PORT_NAME "org.stillframe.agent\n"

/* linux/vm_sockets.h is not part of musl's headers. */
struct vsock_address {
    unsigned short family, reserved;
    unsigned int port, cid;
    unsigned char flags, zero[3];
};

static int open_serial(void)
{
    char path[300], name[64] = "";
    DIR *ports = opendir("/sys/class/virtio-ports");
    for (struct dirent *entry; ports && (entry = readdir(ports));) {
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        FILE *file = fopen(path, "r");
        if (!file)
            continue;
        int ours = fgets(name, sizeof name, file) && !strcmp(name, PORT_NAME);
        fclose(file);
        snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        if (ours)
            return open(path, O_RDWR);
    }
    return -1;
}

static int open_agent(void)
{
    struct vsock_address address = {.family = AF_VSOCK, .port = AGENT_PORT, .cid = LOCAL};
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address)) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Moves what there is; false at the end of `from`. */
static int move(int from, int to)
{
    char data[32768];
    ssize_t count = read(from, data, sizeof data);
    if (count <= 0)
        return 0;
    for (ssize_t done = 0; done < count;) {
        ssize_t written = write(to, data + done, (size_t)(count - done));
        if (written <= 0)
            return 0;
        done += written;
    }
    return 1;
}

int main(void)
{
    int serial = open_serial(), agent = -1;
    if (serial < 0) {
        perror("relay: no port");
        return 1;
    }
    printf("relay: here\n");
    fflush(stdout);
    for (;;) {
        struct pollfd fds[2] = {{.fd = serial, .events = POLLIN}, {.fd = agent, .events = POLLIN}};
        poll(fds, 2, -1);
        if (fds[0].revents & POLLHUP) { /* no host: the port says so for as long as there is none */
            if (agent >= 0)
                close(agent);
            agent = -1;
            usleep(10000);
            continue;
        }
        if (fds[0].revents & POLLIN && agent < 0 && (agent = open_agent()) < 0) {
            perror("relay: no agent");
            return 1;
        }
        if (fds[0].revents & POLLIN)
            move(serial, agent);
        if (agent >= 0 && fds[1].revents && !move(agent, serial)) {
            close(agent);
            agent = -1;
        }
    }
}
