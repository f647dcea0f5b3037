// virtio-rng (virtio 1.2, 5.4).
#include "small.h"

static struct virtio device;
static BIG struct small_ring ring;
static BIG u8 bytes[1 << 16];

static bool init(void)
{
	return small_begin(&device, 4, F_EVENT_INDEX) && small_ring_init(&device, &ring, 0) &&
	       virtio_go(&device);
}

// rng.read COUNT ROUNDS: what came, how many different bytes.
static void read_command(u64 count, u64 rounds)
{
	bool seen[256] = { false };
	u64 total = 0, different = 0, begin = clock_ns();

	if (count > sizeof(bytes))
		count = sizeof(bytes);
	for (u64 i = 0; i < rounds; i++) {
		u32 length;

		small_offer(&device, &ring, 0, bytes, (u32)count, true);
		if (small_wait(&device, &ring, &length) < 0 || length > count) {
			print("fail rng.read total=%u\n", total);
			return;
		}
		total += length;
		for (u32 at = 0; at < length && at < 4096; at++) {
			different += !seen[bytes[at]];
			seen[bytes[at]] = true;
		}
	}
	print("ok rng.read total=%u different=%u crc=0x%x us=%u\n", total, different,
	      run_user(user_crc32, (u64)bytes, count, 0, 0), (clock_ns() - begin) / 1000);
}

bool rng_command(int argc, char **words, u64 *argv)
{
	if (!compare(words[0], "rng.init")) {
		bool good = init();

		print("%s rng.init features=0x%x\n", good ? "ok" : "fail", device.features);
	} else if (!compare(words[0], "rng.read") && argc > 1 && (device.ready || init())) {
		read_command(argv[1], argc > 2 ? argv[2] : 1);
	} else {
		return false;
	}
	return true;
}
