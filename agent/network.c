/* A static IPv4 address on eth0, by ioctls. */
#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <net/route.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "init.h"

static void complain(const char *what) {
    fprintf(stderr, "stillframe-init: network: %s: %s\n", what, strerror(errno));
}

static bool link_up(int fd, const char *name) {
    struct ifreq request = {0};
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (ioctl(fd, SIOCGIFFLAGS, &request))
        return false;
    request.ifr_flags |= IFF_UP | IFF_RUNNING;
    return ioctl(fd, SIOCSIFFLAGS, &request) == 0;
}

static bool set_address(int fd, unsigned long what, struct in_addr address) {
    struct ifreq request = {.ifr_name = "eth0"};
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr = address};
    memcpy(&request.ifr_addr, &in, sizeof in);
    return ioctl(fd, (int)what, &request) == 0;
}

static bool set_gateway(int fd, struct in_addr gateway) {
    struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
    struct sockaddr_in any = {.sin_family = AF_INET}, in = {.sin_family = AF_INET, .sin_addr = gateway};
    memcpy(&route.rt_dst, &any, sizeof any);
    memcpy(&route.rt_genmask, &any, sizeof any);
    memcpy(&route.rt_gateway, &in, sizeof in);
    return ioctl(fd, SIOCADDRT, &route) == 0;
}

void network_configure(const struct config *config) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return complain("socket");
    if (!link_up(fd, "lo"))
        complain("lo");
    char text[64];
    snprintf(text, sizeof text, "%s", text_list_get(&config->list, "address", ""));
    char *slash = strchr(text, '/');
    struct in_addr address, gateway, mask;
    if (!strcmp(text_list_get(&config->list, "network", "0"), "1") && slash) {
        *slash = 0;
        int prefix = atoi(slash + 1);
        mask.s_addr = htonl(prefix > 0 ? ~0u << (32 - (prefix & 31 ? prefix : 32)) : 0);
        if (prefix < 0 || prefix > 32 || inet_pton(AF_INET, text, &address) != 1)
            complain("address is not IPv4 CIDR");
        else if (!set_address(fd, SIOCSIFADDR, address) || !set_address(fd, SIOCSIFNETMASK, mask) ||
                 !link_up(fd, "eth0"))
            complain("eth0");
        else if (inet_pton(AF_INET, text_list_get(&config->list, "gateway", ""), &gateway) == 1 &&
                 !set_gateway(fd, gateway))
            complain("default route");
    }
    close(fd);
}
