#include "sandbox/sandbox.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

int sv_unshare(unsigned long flags)
{
	return unshare((int)flags) < 0 ? -errno : 0;
}

static int write_map(pid_t pid, const char *name, const char *text)
{
	char path[64];
	ssize_t ret;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	ret = write(fd, text, strlen(text));
	ret = ret < 0 ? -errno : 0;
	close(fd);
	return (int)ret;
}

// The helper, still outside: an identity other than one's own can be mapped from there only.
static int write_maps(int go, pid_t pid, const char *uid_map, const char *gid_map,
		      bool keep_groups)
{
	char byte;
	int ret;

	if (read(go, &byte, 1) != 1)
		return -EPIPE;
	if (!keep_groups) {
		ret = write_map(pid, "setgroups", "deny");
		if (ret < 0)
			return ret;
	}
	ret = write_map(pid, "gid_map", gid_map);
	return ret < 0 ? ret : write_map(pid, "uid_map", uid_map);
}

int sv_enter_user_namespace(const char *uid_map, const char *gid_map, bool keep_groups)
{
	int go[2], status, ret = 0;
	pid_t self = getpid(), helper;

	if (pipe2(go, O_CLOEXEC) < 0)
		return -errno;
	helper = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
	if (helper < 0) {
		ret = -errno;
		close(go[0]);
		close(go[1]);
		return ret;
	}
	if (helper == 0) {
		close(go[1]);
		_exit(-write_maps(go[0], self, uid_map, gid_map, keep_groups));
	}
	close(go[0]);
	if (unshare(CLONE_NEWUSER) < 0)
		ret = -errno;
	else if (write(go[1], "", 1) != 1)
		ret = -errno;
	close(go[1]);
	while (waitpid(helper, &status, 0) < 0 && errno == EINTR)
		;
	if (ret < 0)
		return ret;
	return WIFEXITED(status) ? -WEXITSTATUS(status) : -ECHILD;
}

#define EMPTY_OPTIONS "size=4k,nr_inodes=2,mode=0555"
#define EMPTY_FLAGS (MS_NOSUID | MS_NODEV | MS_NOEXEC)

int sv_empty_root(void)
{
	// Any directory will do: what it held can't be reached afterwards.
	static const char place[] = "/proc";

	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
	    mount("empty", place, "tmpfs", EMPTY_FLAGS, EMPTY_OPTIONS) < 0 || chdir(place) < 0)
		return -errno;
	if (syscall(SYS_pivot_root, ".", ".") == 0) {
		// Now the old root lies over the new one.
		if (umount2(".", MNT_DETACH) < 0)
			return -errno;
	} else if (errno != EINVAL || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0) {
		// EINVAL: the root is the initial ramfs, which can't be pivoted, but be covered.
		return -errno;
	}
	if (chdir("/") < 0 || mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY |
				    EMPTY_FLAGS, NULL) < 0)
		return -errno;
	return 0;
}
