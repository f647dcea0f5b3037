// The command `stratovirt`: becomes the Python interpreter that runs the product.
//
// It names the real interpreter (no version manager's shim) and starts it with -I -S, which is
// worth several milliseconds; no process stays in between. In a source tree interpreter and
// module path are compiled in (SV_PYTHON, SV_PATHS, parted by colons); in an installed
// environment they are found beside the command: <prefix>/bin/python3 and
// <prefix>/lib/python3.*/site-packages.
#define _GNU_SOURCE
#include <errno.h>
#include <glob.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// Modules come from one file where it is to be had (native/bundle.py), else as usual. Until the
// guest runs there is nothing that a garbage collection could find; vmm.__main__ turns it on.
#define CODE                                                                                   \
	"import sys,gc\n"                                                                      \
	"gc.disable()\n"                                                                       \
	"sys.path[:0]=sys.argv.pop(1).split(':')\n"                                            \
	"try:\n"                                                                               \
	" from marshal import load\n"                                                          \
	" from _frozen_importlib_external import MAGIC_NUMBER\n"                               \
	" root=sys.path[0]\n"                                                                  \
	" file=open(root+'/vmm/__pycache__/startup.'+sys.implementation.cache_tag,'rb')\n"     \
	" if load(file)==MAGIC_NUMBER:exec(load(file),{'file':file,'root':root})\n"            \
	" file.close()\n"                                                                      \
	"except (OSError,EOFError,ValueError,TypeError):pass\n"                                \
	"from vmm.__main__ import run\n"                                                       \
	"run()"

static int fail(const char *what, const char *name)
{
	fprintf(stderr, "stratovirt: %s %s: %s; reinstall the command\n", what, name,
		strerror(errno));
	return 1;
}

int main(int argc, char **argv)
{
	char **out = calloc((size_t)argc + 7, sizeof(*out));
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
	for (int i = 1; i < argc; i++)
		out[at++] = argv[i];
	// In this locale the interpreter uses UTF-8 by itself, and loads no tables for it.
	setenv("LC_ALL", "C", 1);
	execv(python, out);
	return fail("can't execute", python);
}
