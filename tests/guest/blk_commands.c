// The commands blk.…: DISK is a number, 0 is the first.
#include "blk.h"

struct job {
	struct disk *disk;
	u32 type, depth, chunk; // chunk in sectors
	u64 sector, count, next, done, chunks;
	bool shuffled;
};

// Give the device whatever fits; chunk number i goes to queue i % queues.
static void job_submit(struct job *job, u32 *in_flight)
{
	struct disk *disk = job->disk;

	for (u32 number = 0; number < disk->queues; number++) {
		struct queue *queue = &disk->queue[number];
		u16 before = queue->published;

		for (u32 slot = 0; slot < queue->slots && slot < job->depth; slot++) {
			u64 index = job->shuffled ? job->next * 7919 % job->chunks : job->next;
			u64 begin = index * job->chunk, size = job->chunk;

			if (job->next == job->chunks || *in_flight == job->depth)
				break;
			if (queue->busy[slot])
				continue;
			if (job->next % disk->queues != number)
				break;
			if (begin + size > job->count)
				size = job->count - begin;
			queue_add(disk, number, slot,
				  (struct header){ job->type, 0, job->sector + begin },
				  data + begin * SECTOR, (u32)size * SECTOR);
			job->next++;
			++*in_flight;
		}
		if (queue->published != before)
			queue_kick(disk, number, before);
	}
}

// Transfers job->count sectors between `data` and the disk; the worst status.
static u8 job_run(struct job *job)
{
	struct disk *disk = job->disk;
	volatile u64 *seen = &interrupt_count[VECTOR_GSI + disk->virtio.gsi], old;
	u64 deadline = clock_ns() + TIMEOUT;
	u32 in_flight = 0;
	u8 status = 0;

	job->chunks = (job->count + job->chunk - 1) / job->chunk;
	while (job->done < job->chunks) {
		u64 before = job->done;

		job_submit(job, &in_flight);
		old = *seen;
		for (u32 number = 0; number < disk->queues; number++) {
			int count = queue_collect(disk, number, &status);

			if (count < 0)
				return S_NONE;
			job->done += (u32)count;
			in_flight -= (u32)count;
		}
		if (job->done != before || job->done == job->chunks) {
			deadline = clock_ns() + TIMEOUT;
			continue;
		}
		if (!wait_change(seen, old, deadline)) {
			print("note lost after %u of %u, status 0x%x, used %u seen %u\n", job->done,
			      job->chunks, (u64)virtio_get(&disk->virtio, REG_STATUS),
			      (u64)disk->queue->used.index, (u64)disk->queue->last_used);
			return S_NONE;
		}
	}
	return status;
}

static u8 transfer(struct disk *disk, u32 type, u64 sector, u64 count, u64 depth, u64 chunk,
		   bool shuffled)
{
	struct job job = { disk, type, (u32)depth, (u32)chunk, sector, count, 0, 0, 0, shuffled };

	return job_run(&job);
}

static void answer(const char *name, u8 status)
{
	if (status == S_NONE)
		print("fail %s no answer\n", name);
	else if (status)
		print("fail %s status=%u\n", name, (u64)status);
	else
		print("ok %s\n", name);
}

static void info(struct disk *disk)
{
	print("ok blk.info sectors=%u features=0x%x queues=%u size=%u blk-size=%u changes=%u\n",
	      (u64)virtio_get(&disk->virtio, REG_CONFIG) |
		      (u64)virtio_get(&disk->virtio, REG_CONFIG + 4) << 32,
	      disk->virtio.features, (u64)disk->queues, (u64)disk->queue->size,
	      (u64)virtio_get(&disk->virtio, REG_CONFIG + 20), disk->virtio.config_changes);
}

// blk.await DISK CHANGES MILLISECONDS: until its configuration has changed more often than that.
static void await_command(struct disk *disk, u64 changes, u64 limit)
{
	u64 deadline = clock_ns() + limit * NSEC_PER_MS;

	print("note waiting\n");
	while (disk->virtio.config_changes == changes &&
	       wait_change(&disk->virtio.config_changes, changes, deadline))
		;
	timer_stop();
	print("%s blk.await changes=%u\n", disk->virtio.config_changes == changes ? "fail" : "ok",
	      disk->virtio.config_changes);
}

// blk.read DISK SECTOR COUNT [DEPTH CHUNK]: CRC-32 of the sectors.
static void read_command(struct disk *disk, u64 sector, u64 count, u64 depth, u64 chunk)
{
	u8 status = transfer(disk, T_IN, sector, count, depth, chunk, false);

	if (status)
		answer("blk.read", status);
	else
		print("ok blk.read crc=0x%x\n",
		      run_user(user_crc32, (u64)data, count * SECTOR, 0, 0));
}

static void write_command(struct disk *disk, u64 sector, u64 count, u64 seed, u64 depth, u64 chunk)
{
	run_user(user_fill, (u64)data, count * SECTOR / 8, sector * SECTOR / 8, seed);
	answer("blk.write", transfer(disk, T_OUT, sector, count, depth, chunk, true));
}

static void verify_command(struct disk *disk, u64 sector, u64 count, u64 seed, u64 depth, u64 chunk)
{
	u8 status;
	u64 bad;

	run_user(user_zero, (u64)data, count * SECTOR / 8, 0, 0);
	status = transfer(disk, T_IN, sector, count, depth, chunk, true);
	if (status) {
		answer("blk.verify", status);
		return;
	}
	bad = run_user(user_check, (u64)data, count * SECTOR / 8, sector * SECTOR / 8, seed);
	if (bad != ~0ull)
		print("fail blk.verify sector=%u word=%u is 0x%x\n", sector + bad / 64, bad % 64,
		      ((u64 *)data)[bad]);
	else
		print("ok blk.verify\n");
}

// blk.stress DISK SECTOR COUNT ROUNDS DEPTH: write and verify, another chunk size each round.
static void stress_command(struct disk *disk, u64 sector, u64 count, u64 rounds, u64 depth)
{
	for (u64 round = 0; round < rounds; round++) {
		u64 chunk = 1 + round * 5 % 17, words = count * SECTOR / 8, bad;
		u8 status;

		run_user(user_fill, (u64)data, words, sector * SECTOR / 8, round);
		status = transfer(disk, T_OUT, sector, count, depth, chunk, true);
		run_user(user_zero, (u64)data, words, 0, 0);
		if (!status)
			status = transfer(disk, T_IN, sector, count, depth, chunk + round % 3, true);
		bad = run_user(user_check, (u64)data, words, sector * SECTOR / 8, round);
		if (status || bad != ~0ull) {
			print("fail blk.stress round=%u status=%u word=%u\n", round, (u64)status,
			      bad);
			return;
		}
	}
	print("ok blk.stress\n");
}

// blk.discard, blk.zero DISK SECTOR COUNT [FLAGS] (flag 1: unmap)
static void range_command(struct disk *disk, const char *name, u32 type, u64 sector, u64 count,
			  u64 flags)
{
	struct {
		u64 sector;
		u32 count, flags;
	} range = { sector, (u32)count, (u32)flags };

	memcpy(data, &range, sizeof(range));
	answer(name, disk_request(disk, type, 0, data, sizeof(range)));
}

static void is_zero_command(struct disk *disk, u64 sector, u64 count)
{
	u8 status;
	u64 bad;

	run_user(user_fill, (u64)data, count * SECTOR / 8, 0, 99);
	status = transfer(disk, T_IN, sector, count, 8, 64, false);
	if (status) {
		answer("blk.is-zero", status);
		return;
	}
	bad = run_user(user_is_zero, (u64)data, count * SECTOR / 8, 0, 0);
	print("%s blk.is-zero sector=%u\n", bad == ~0ull ? "ok" : "fail",
	      bad == ~0ull ? sector : sector + bad / 64);
}

static void id_command(struct disk *disk)
{
	u8 status;

	memset(data, 0, 24);
	status = disk_request(disk, T_GET_ID, 0, data, 20);
	if (status)
		answer("blk.id", status);
	else
		print("ok blk.id %s\n", (char *)data);
}

static u64 argument(int argc, u64 *argv, int index, u64 absent)
{
	return index < argc ? argv[index] : absent;
}

// Commands with DISK SECTOR COUNT ….
static bool sectors_command(struct disk *disk, const char *name, int argc, u64 *argv)
{
	u64 sector = argument(argc, argv, 2, 0), count = argument(argc, argv, 3, 1);
	u64 fourth = argument(argc, argv, 4, 0);
	bool seeded = !compare(name, "write") || !compare(name, "verify");
	u64 depth = argument(argc, argv, seeded ? 5 : 4, 8);
	u64 chunk = argument(argc, argv, seeded ? 6 : 5, 8);

	if (count * SECTOR > DATA_SIZE || !chunk || (!depth && seeded))
		print("fail blk.%s at most %u sectors\n", name, (u64)(DATA_SIZE / SECTOR));
	else if (!compare(name, "read"))
		read_command(disk, sector, count, depth ? depth : 1, chunk);
	else if (!compare(name, "write"))
		write_command(disk, sector, count, fourth, depth, chunk);
	else if (!compare(name, "verify"))
		verify_command(disk, sector, count, fourth, depth, chunk);
	else if (!compare(name, "stress"))
		stress_command(disk, sector, count, fourth ? fourth : 1, argument(argc, argv, 5, 16));
	else if (!compare(name, "discard"))
		range_command(disk, "blk.discard", T_DISCARD, sector, count, fourth);
	else if (!compare(name, "zero"))
		range_command(disk, "blk.zero", T_WRITE_ZEROES, sector, count, fourth);
	else if (!compare(name, "is-zero"))
		is_zero_command(disk, sector, count);
	else
		return false;
	return true;
}

bool blk_command(int argc, char **words, u64 *argv)
{
	const char *name = words[0] + 4;
	struct disk *disk = &disks[argument(argc, argv, 1, 0) % MAX_DISKS];

	if (!compare(name, "count")) {
		print("ok blk.count %u\n", (u64)disk_count);
		return true;
	}
	if (disk >= &disks[disk_count]) {
		print("fail %s no such disk\n", words[0]);
		return true;
	}
	if (!compare(name, "init")) { // blk.init DISK [FEATURES QUEUE-SIZE]
		bool right = disk_init(disk, argument(argc, argv, 2, ~0ull),
				       (u32)argument(argc, argv, 3, 0));

		print("%s blk.init features=0x%x status=0x%x\n", right ? "ok" : "fail",
		      disk->virtio.features, (u64)virtio_get(&disk->virtio, REG_STATUS));
		return true;
	}
	if (!compare(name, "reset")) {
		virtio_reset(&disk->virtio);
		answer("blk.reset", 0);
		return true;
	}
	if (!disk->virtio.ready && !disk_init(disk, ~0ull, 0)) {
		print("fail %s the device refuses the driver\n", words[0]);
		return true;
	}
	if (!compare(name, "info"))
		info(disk);
	else if (!compare(name, "await"))
		await_command(disk, argument(argc, argv, 2, 0), argument(argc, argv, 3, 5000));
	else if (!compare(name, "flush"))
		answer("blk.flush", disk_request(disk, T_FLUSH, 0, NULL, 0));
	else if (!compare(name, "id"))
		id_command(disk);
	else if (!compare(name, "overlap")) // blk.overlap DISK SECTOR LANES ROUNDS SALT
		blk_overlap(disk, argument(argc, argv, 2, 0), argument(argc, argv, 3, 16),
			    argument(argc, argv, 4, 4), argument(argc, argv, 5, 1));
	else if (!compare(name, "hostile") && argc > 2)
		return blk_hostile((u32)(disk - disks), words[2]);
	else
		return sectors_command(disk, name, argc, argv);
	return true;
}
