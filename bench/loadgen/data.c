// What the blocks hold.
#include "loadgen.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WORDS (SECTOR / 8)
#define GOLDEN 0x9e3779b97f4a7c15ull

static uint64_t body(uint64_t sector, uint64_t stamp)
{
	return (sector ^ stamp << 17) * GOLDEN;
}

void data_fill(void *data, uint64_t sector, uint64_t count, uint64_t stamp)
{
	uint64_t *words = data;

	for (; count; count--, sector++, words += WORDS) {
		uint64_t base = body(sector, stamp);

		words[0] = sector;
		words[1] = stamp;
		for (unsigned int i = 2; i < WORDS; i++)
			words[i] = base + i;
	}
}

uint64_t data_check(const void *data, uint64_t sector, uint64_t count, bool sectors_only)
{
	const uint64_t *words = data;
	uint64_t stamp = words[1];

	for (; count; count--, sector++, words += WORDS) {
		uint64_t base = body(sector, stamp), wrong = 0;

		if (words[0] != sector)
			fail("sector %lu: it says that it is %lu", sector, words[0]);
		if (words[1] != stamp)
			fail("sector %lu: stamp 0x%lx beside 0x%lx, a torn block", sector, words[1],
			     stamp);
		if (sectors_only)
			continue;
		for (unsigned int i = 2; i < WORDS; i++)
			wrong |= words[i] ^ (base + i);
		if (wrong)
			fail("sector %lu: the header is right, the rest isn't", sector);
	}
	return stamp;
}

void data_prepare(const char *path, uint64_t bytes, uint64_t seed)
{
	static uint8_t block[4096] __attribute__((aligned(4096)));
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

	if (fd < 0)
		fail("%s: %s", path, strerror(errno));
	// What is cached goes first: what comes back in by these writes comes in small folios, so
	// that every round starts from the same cache.
	if (fdatasync(fd) < 0 || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED))
		fail("%s: the cache can't be dropped", path);
	for (uint64_t at = 0; at < bytes; at += sizeof(block)) {
		data_fill(block, at / SECTOR, sizeof(block) / SECTOR, seed << 32);
		if (pwrite(fd, block, sizeof(block), (off_t)at) != sizeof(block))
			fail("%s: %s", path, strerror(errno));
	}
	if (ftruncate(fd, (off_t)bytes) < 0 || fdatasync(fd) < 0)
		fail("%s: %s", path, strerror(errno));
	close(fd);
}
