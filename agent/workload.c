/* Starting the workload, and what it shares with commands started later. */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <sys/stat.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "init.h"

#define DEFAULT_PATH "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

static bool has_variable(char **environment, const char *prefix) {
    for (; *environment; environment++)
        if (!strncmp(*environment, prefix, strlen(prefix)))
            return true;
    return false;
}

char **workload_environment(const struct config *config, const struct account *account, size_t extra) {
    static char home[300];
    char **all = text_list_all(&config->list, "env", extra + 2), **end = all;
    while (*end)
        end++;
    if (!has_variable(all, "PATH="))
        *end++ = DEFAULT_PATH;
    if (!has_variable(all, "HOME=")) {
        strcpy(home, "HOME=");
        strncat(home, account->home, sizeof home - 6);
        *end++ = home;
    }
    return all;
}

void process_defaults(void) {
    sigset_t none;
    sigemptyset(&none);
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
    write_file("/proc/self/oom_score_adj", "0", 1, 0);
    umask(022);
}

int become(const struct account *account) {
    gid_t groups[65];
    memcpy(groups, account->groups, account->group_count * sizeof *groups);
    groups[account->group_count] = account->gid;
    if (setgroups(account->group_count + 1, groups) || setgid(account->gid) || setuid(account->uid))
        return -errno;
    return 0;
}

/* What the workload's process tells when it cannot become the program. */
struct failure {
    int error;
    char step[28];
};

/* As OCI runtimes do, a working directory that the image lacks is made, by root. */
static void make_working_directory(const char *directory) {
    if (!make_directories(directory))
        mkdir(directory, 0755);
}

_Noreturn static void run(const struct config *config, char **arguments, int console, int report) {
    struct account account;
    process_defaults();
    int null = open("/dev/null", O_RDONLY);
    dup2(null, 0);
    dup2(console, 1);
    dup2(console, 2);
    const char *directory = text_list_get(&config->list, "cwd", "/"), *step = " (user)";
    int error = -find_account(text_list_get(&config->list, "user", ""), &account);
    if (!error && *directory)
        make_working_directory(directory); /* chdir tells whether it is there */
    if (!error && fchmod(console, 0666)) /* so that /dev/stdout opens for any user */
        error = errno;
    if (!error)
        error = -become(&account);
    if (!error) {
        step = " (working directory)";
        if (chdir(*directory ? directory : "/"))
            error = errno;
    }
    if (!error) {
        step = "";
        environ = workload_environment(config, &account, 0);
        execvp(arguments[0], arguments);
        error = errno;
    }
    struct failure failure = {.error = error};
    strncpy(failure.step, step, sizeof failure.step - 1);
    if (write(report, &failure, sizeof failure) < 0)
        _exit(126);
    _exit(127);
}

pid_t workload_start(const struct config *config, int console, int *error, char *step, size_t size) {
    int report[2];
    struct failure failure;
    char **arguments = text_list_all(&config->list, "arg", 0);
    *error = 0;
    *step = 0;
    if (!arguments[0]) { /* an image without a command: the guest is there for its agent */
        free(arguments);
        return 0;
    }
    if (pipe2(report, O_CLOEXEC)) {
        *error = errno;
        return -1;
    }
    pid_t pid = fork();
    if (pid == 0)
        run(config, arguments, console, report[1]);
    close(report[1]);
    if (pid < 0)
        *error = errno;
    else if (read(report[0], &failure, sizeof failure) == sizeof failure) {
        *error = failure.error;
        snprintf(step, size, "%s", failure.step);
    }
    close(report[0]);
    free(arguments);
    return pid;
}
