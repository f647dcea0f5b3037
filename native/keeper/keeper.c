// The keeper: starts nurseries for a core that may not execute programs any more.
//
//   keeper PROGRAM ARGUMENT...        with a socket (SOCK_SEQPACKET) as descriptor 3
//
// The core executes it once, before it confines itself. It holds nothing but its end of the
// socket, and what it executes was fixed when it was started: a message says "now" and brings
// two descriptors, the program's own descriptor 3 and its standard streams; the answer is a pid
// with its pidfd. The program's parent is the core. It ends when the core does.
#include <errno.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SOCKET_FD 3

union control {
	char space[CMSG_SPACE(2 * sizeof(int))];
	struct cmsghdr align;
};

static int receive(int fds[2])
{
	char byte;
	union control control;
	struct iovec vector = {.iov_base = &byte, .iov_len = 1};
	struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1,
				 .msg_control = control.space,
				 .msg_controllen = sizeof(control.space)};
	ssize_t got = recvmsg(SOCKET_FD, &message, MSG_CMSG_CLOEXEC);
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	if (got <= 0)
		return got < 0 && errno == EINTR ? 0 : -1;
	if (!header || header->cmsg_type != SCM_RIGHTS ||
	    header->cmsg_len != CMSG_LEN(2 * sizeof(int)))
		return -1; // the core never says this
	memcpy(fds, CMSG_DATA(header), 2 * sizeof(int));
	return 1;
}

static void answer(int32_t pid, int pidfd)
{
	union control control = {.space = {0}};
	struct iovec vector = {.iov_base = &pid, .iov_len = sizeof(pid)};
	struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1};

	if (pidfd >= 0) {
		struct cmsghdr *header = &control.align;

		message.msg_control = control.space;
		message.msg_controllen = CMSG_SPACE(sizeof(int));
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(header), &pidfd, sizeof(int));
	}
	sendmsg(SOCKET_FD, &message, MSG_NOSIGNAL);
}

static void become(char **program, int channel, int null)
{
	setsid();
	for (int fd = 0; fd < 3; fd++)
		dup2(null, fd);
	dup2(channel, SOCKET_FD);
	syscall(SYS_close_range, SOCKET_FD + 1, ~0u, 0);
	execve(program[0], program, environ);
	_exit(127);
}

int main(int argc, char **argv)
{
	int fds[2], got;

	if (argc < 2)
		return 2;
	prctl(PR_SET_NAME, "sv-keeper");
	while ((got = receive(fds)) >= 0) {
		int pidfd = -1;
		long pid;

		if (!got)
			continue;
		pid = syscall(SYS_clone, CLONE_PARENT | CLONE_PIDFD, NULL, &pidfd, NULL, NULL);
		if (pid == 0)
			become(&argv[1], fds[0], fds[1]);
		answer(pid < 0 ? -errno : (int32_t)pid, pidfd);
		close(fds[0]);
		close(fds[1]);
		if (pidfd >= 0)
			close(pidfd);
	}
	return 0;
}
