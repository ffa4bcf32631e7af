/*
 * The agent as an ordinary process of this machine, for tests that need no guest:
 *
 *   serve FD   serves the host at the other end of the stream socket FD, until that is gone
 */
#include "../../agent/agent.c"

int main(int count, char **arguments)
{
    static struct config config;
    static struct shared shared = {.workload = WORKLOAD_RUNNING};
    static struct agent agent;
    static char empty[1];
    if (count != 2 || !text_list_open(&config.list, (const uint8_t *)empty, 0))
        return 2;
    agent = (struct agent){.config = &config, .shared = &shared, .control = -1, .console = 1, .listener = -1};
    agent.tail = &agent.head;
    agent.port = atoi(arguments[1]);
    fcntl(agent.port, F_SETFL, O_NONBLOCK);
    signal(SIGPIPE, SIG_IGN);
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGCHLD);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    agent.epoll = epoll_create1(EPOLL_CLOEXEC);
    watch_fd(&agent, agent.port);
    loop(&agent, signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK));
}
