// CPU time of another process.
#include "frontend.h"

#include <ctype.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static pid_t parent_of(pid_t pid)
{
	char path[64], text[512], *end;
	FILE *file;
	pid_t parent = 0;
	size_t length;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	file = fopen(path, "r");
	if (!file)
		return 0;
	length = fread(text, 1, sizeof(text) - 1, file);
	text[length] = 0;
	fclose(file);
	end = strrchr(text, ')'); // the name may hold anything
	if (end)
		sscanf(end + 1, " %*c %d", &parent);
	return parent;
}

// The clock of a process counts its dead threads too, io_uring's own included, to the nanosecond.
static void add_clock(struct cost *cost, pid_t pid)
{
	if (cost->count == sizeof(cost->clocks) / sizeof(cost->clocks[0]))
		fail("--pid: more processes than expected");
	if (clock_getcpuclockid(pid, &cost->clocks[cost->count]))
		fail("--pid %d: there is no such process", pid);
	cost->count++;
}

void cost_open(struct cost *cost, pid_t pid)
{
	pid_t family[64] = {pid};
	unsigned int count = 1;

	cost->count = 0;
	if (!pid)
		return;
	for (unsigned int i = 0; i < count; i++) {
		DIR *proc = opendir("/proc");
		struct dirent *entry;

		add_clock(cost, family[i]);
		while (proc && (entry = readdir(proc))) {
			pid_t child = isdigit((unsigned char)entry->d_name[0]) ? atoi(entry->d_name) : 0;

			if (child && parent_of(child) == family[i] && count < 64)
				family[count++] = child;
		}
		closedir(proc);
	}
}

uint64_t cost_ns(const struct cost *cost)
{
	uint64_t sum = 0;

	for (unsigned int i = 0; i < cost->count; i++) {
		struct timespec ts;

		if (clock_gettime(cost->clocks[i], &ts))
			fail("the back end ended");
		sum += (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
	}
	return sum;
}
