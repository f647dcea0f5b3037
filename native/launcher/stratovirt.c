// The command `stratovirt`: becomes the Python interpreter that runs the product.
//
// It names the real interpreter (no version manager's shim) and starts it with -I -S, which is
// worth several milliseconds; no process stays in between. In a source tree interpreter and
// module path are compiled in (SV_PYTHON, SV_PATHS, parted by colons); in an installed
// environment they are found beside the command: <prefix>/bin/python3 and
// <prefix>/lib/python3.*/site-packages.
//
// The nursery of workers is an interpreter too. Started here, it gets ready while this process
// does, on another processor, and can inherit nothing: there is nothing yet.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <limits.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

// Arguments: paths, parted by colons; a module; what its run() gets. Modules come from one file
// where it is to be had (native/bundle.py), else as usual. Until the guest runs, or there is a
// worker, there is nothing that a garbage collector could find.
#define CODE                                                                                   \
	"import sys,gc,_signal\n"                                                              \
	"_signal.signal(2,_signal.SIG_DFL)\n" /* until vmm/__main__.py it just ends us */       \
	"gc.disable()\n"                                                                       \
	"sys.path[:0]=sys.argv.pop(1).split(':')\n"                                            \
	"name=sys.argv.pop(1)\n"                                                               \
	"try:\n"                                                                               \
	" from marshal import loads\n"                                                         \
	" from posix import close,open,read,stat\n"                                            \
	" from _frozen_importlib_external import MAGIC_NUMBER\n"                               \
	" root=sys.path[0]\n"                                                                  \
	" path='%s/%s/__pycache__/startup.%s'%(root,name.partition('.')[0],"                   \
	"sys.implementation.cache_tag)\n"                                                      \
	" file=open(path,524288)\n" /* O_CLOEXEC */                                            \
	" data=memoryview(read(file,stat(path).st_size))\n"                                    \
	" close(file)\n"                                                                       \
	" if data[:4]==MAGIC_NUMBER:exec(loads(data[12:]),{'data':data,'root':root})\n"        \
	" del data\n"                                                                          \
	"except (OSError,EOFError,ValueError,TypeError):pass\n"                                \
	"__import__(name,None,None,['run']).run(sys.argv.pop(1))"

#define CHANNEL_FD 3
#define GATE_FD 4
#define LARGE (16 << 20)

// Whether the command line asks for a VM whose nursery is as any other and this process's child.
static bool wants_nursery(char **argv, const char **kernel)
{
	static const char *const others[] = {"-daemonize", "-sandbox", "-help", "-h", "-version",
					     "-V"};

	*kernel = NULL;
	for (int i = 1; argv[i]; i++) {
		if (!strcmp(argv[i], "-kernel"))
			*kernel = argv[i + 1];
		for (size_t k = 0; k < sizeof(others) / sizeof(*others); k++)
			if (!strcmp(argv[i], others[k]))
				return false;
	}
	// A descriptor that we open must not become standard input, output or error.
	return *kernel && fcntl(0, F_GETFD) >= 0 && fcntl(1, F_GETFD) >= 0 &&
	       fcntl(2, F_GETFD) >= 0;
}

// Whether the nursery had better wait until the guest runs: a large kernel is copied by a thread
// of this process, and on two processors both would share them with the nursery.
static bool should_wait(const char *kernel)
{
	struct stat info;
	cpu_set_t set;

	return sched_getaffinity(0, sizeof(set), &set) == 0 && CPU_COUNT(&set) <= 2 &&
	       stat(kernel, &info) == 0 && info.st_size >= LARGE;
}

// In the child. As vmm/worker/nursery.py starts later ones. `gate`: -1, or the end of a pipe whose
// other end is closed when its modules may be loaded.
static void become_nursery(char *python, char *paths, int channel, int gate)
{
	char *waits = gate < 0 ? "" : "4"; // GATE_FD
	char *argv[] = {python, "-I", "-S", "-c", CODE, paths, "workers.begin", waits, NULL};
	char *environment[] = {"LC_ALL=C", NULL};
	int null, high, wait = -1;

	setsid();
	null = open("/dev/null", O_RDWR | O_CLOEXEC);
	high = fcntl(channel, F_DUPFD_CLOEXEC, 64);
	if (gate >= 0)
		wait = fcntl(gate, F_DUPFD_CLOEXEC, 64);
	if (null < 0 || high < 0 || (gate >= 0 && wait < 0))
		_exit(127);
	for (int fd = 0; fd < 3; fd++)
		dup2(null, fd);
	dup2(high, CHANNEL_FD);
	if (gate >= 0)
		dup2(wait, GATE_FD);
	syscall(SYS_close_range, gate < 0 ? GATE_FD : GATE_FD + 1, ~0U, 0);
	execve(python, argv, environment);
	_exit(127); // the core sees its end
}

// Fills `text` with "DESCRIPTOR:PID:GATE": our end of its channel, itself, what it waits for (-1:
// nothing); empty: there is none, the core starts one if it needs one.
static void start_nursery(char *python, char *paths, char **argv, char *text, size_t size)
{
	int ends[2], gate[2] = {-1, -1};
	const char *kernel;
	pid_t pid;

	*text = 0;
	if (!wants_nursery(argv, &kernel) || socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) < 0)
		return;
	if (should_wait(kernel) && pipe(gate) < 0)
		gate[0] = gate[1] = -1;
	pid = fork();
	if (pid == 0) {
		close(ends[0]);
		close(gate[1]);
		become_nursery(python, paths, ends[1], gate[0]);
	}
	close(ends[1]);
	close(gate[0]);
	if (pid < 0) {
		close(ends[0]);
		close(gate[1]);
	} else {
		snprintf(text, size, "%d:%d:%d", ends[0], (int)pid, gate[1]);
	}
}

static int fail(const char *what, const char *name)
{
	fprintf(stderr, "stratovirt: %s %s: %s; reinstall the command\n", what, name,
		strerror(errno));
	return 1;
}

int main(int argc, char **argv)
{
	char **out = calloc((size_t)argc + 8, sizeof(*out));
	char nursery[48];
	int at = 0;
#ifdef SV_PYTHON
	char python[] = SV_PYTHON, paths[] = SV_PATHS;
#else
	char self[PATH_MAX], python[PATH_MAX + 16], pattern[PATH_MAX + 64], *paths, *slash;
	ssize_t length = readlink("/proc/self/exe", self, sizeof(self) - 1);
	glob_t found;

	if (length < 0)
		return fail("can't read", "/proc/self/exe");
	self[length] = 0;
	slash = strrchr(self, '/');
	*slash = 0;
	snprintf(python, sizeof(python), "%s/python3", self);
	slash = strrchr(self, '/');
	if (slash)
		*slash = 0;
	snprintf(pattern, sizeof(pattern), "%s/lib/python3.*/site-packages", self);
	if (glob(pattern, 0, NULL, &found) || !found.gl_pathc) {
		errno = ENOENT;
		return fail("can't find", pattern);
	}
	paths = found.gl_pathv[0];
#endif
	if (!out)
		return fail("can't start", python);
	out[at++] = python;
	out[at++] = "-I";
	out[at++] = "-S";
	out[at++] = "-c";
	out[at++] = CODE;
	out[at++] = paths;
	out[at++] = "vmm.__main__";
	start_nursery(python, paths, argv, nursery, sizeof(nursery));
	out[at++] = nursery;
	for (int i = 1; i < argc; i++)
		out[at++] = argv[i];
	// In this locale the interpreter uses UTF-8 by itself, and loads no tables for it.
	setenv("LC_ALL", "C", 1);
	execv(python, out);
	return fail("can't execute", python);
}
