// blk.overlap: overlapping writes, as a file system makes them. Each lane owns some sectors and
// writes version after version there, the next one as soon as the last is acknowledged, with a
// read between. Whatever an acknowledged write or a read did must stay done: a late repetition of
// an older one shows as wrong data.
#include "blk.h"

#define LANE_SECTORS 8
#define LANE_BYTES (LANE_SECTORS * SECTOR)
#define MAX_LANES 256

struct run {
	struct disk *disk;
	u64 sector, rounds, salt;
	u32 lanes, busy, done;
	u32 step[MAX_LANES]; // even: to write version step / 2, odd: to read it
	bool pending[MAX_LANES];
};

static struct run run;

static u8 *lane_buffer(u32 lane, u32 step)
{
	return data + lane * 2 * LANE_BYTES + (step & 1) * LANE_BYTES;
}

static u64 lane_first(u32 lane)
{
	return (run.sector + lane * LANE_SECTORS) * SECTOR / 8;
}

// What the lane's last request left; false: a note tells what is wrong.
static bool lane_finished(u32 lane)
{
	u32 step = run.step[lane];
	u64 version = run.salt + step / 2, bad;

	run.pending[lane] = false;
	run.busy--;
	run.step[lane]++;
	if (run.step[lane] == 2 * run.rounds)
		run.done++;
	if (!(step & 1))
		return true;
	bad = run_user(user_check, (u64)lane_buffer(lane, 1), LANE_BYTES / 8, lane_first(lane),
		       version);
	// From here on the buffer is ours: nobody may write there until it is handed out again.
	run_user(user_zero, (u64)lane_buffer(lane, 1), LANE_BYTES / 8, 0, 0);
	if (bad == ~0ull)
		return true;
	print("note lane %u read something else than version %u at word %u\n", (u64)lane, version,
	      bad);
	return false;
}

static bool lane_start(u32 lane)
{
	struct disk *disk = run.disk;
	u32 step = run.step[lane];
	u8 *buffer = lane_buffer(lane, step);
	struct header header = { step & 1 ? T_IN : T_OUT, 0, run.sector + lane * LANE_SECTORS };

	if (step & 1) {
		if (run_user(user_is_zero, (u64)buffer, LANE_BYTES / 8, 0, 0) != ~0ull) {
			print("note lane %u: its buffer was written after its read\n", (u64)lane);
			return false;
		}
	} else {
		run_user(user_fill, (u64)buffer, LANE_BYTES / 8, lane_first(lane),
			 run.salt + step / 2);
	}
	queue_add(disk, lane % disk->queues, lane / disk->queues, header, buffer, LANE_BYTES);
	run.pending[lane] = true;
	run.busy++;
	return true;
}

// One look at every lane of a queue.
static bool queue_advance(u32 number)
{
	struct queue *queue = &run.disk->queue[number];
	u16 before = queue->published;
	bool right = true;

	for (u32 lane = number; lane < run.lanes && right; lane += run.disk->queues) {
		if (run.pending[lane] && !queue->busy[lane / run.disk->queues])
			right = lane_finished(lane);
		if (right && !run.pending[lane] && run.step[lane] < 2 * run.rounds)
			right = lane_start(lane);
	}
	if (queue->published != before)
		queue_kick(run.disk, number, before);
	return right;
}

// Every queue until all lanes are through; the worst status, S_NONE for all else that is wrong.
static u8 advance_all(u64 *longest)
{
	struct disk *disk = run.disk;
	volatile u64 *seen = &interrupt_count[VECTOR_GSI + disk->virtio.gsi], old;
	u64 last = clock_ns();
	u8 status = 0;

	while (run.done < run.lanes) {
		u32 before = run.busy;
		int count = 0;

		old = *seen;
		for (u32 number = 0; number < disk->queues; number++) {
			int found = queue_collect(disk, number, &status);

			if (found < 0 || !queue_advance(number))
				return S_NONE;
			count += found;
		}
		if (status)
			return status;
		if (count || !before) {
			last = clock_ns(); // what we did ourselves meanwhile doesn't count
		} else if (!wait_change(seen, old, last + TIMEOUT)) {
			print("note lost: %u in flight\n", (u64)run.busy);
			return S_NONE;
		} else if (clock_ns() - last > *longest) {
			*longest = clock_ns() - last;
		}
	}
	return status;
}

void blk_overlap(struct disk *disk, u64 sector, u64 lanes, u64 rounds, u64 salt)
{
	u64 longest = 0;
	u8 status;

	if (!lanes || lanes > MAX_LANES || lanes > disk->queues * disk->queue->slots || !rounds) {
		print("fail blk.overlap at most %u lanes\n", (u64)disk->queues * disk->queue->slots);
		return;
	}
	memset(&run, 0, sizeof(run));
	run.disk = disk;
	run.sector = sector;
	run.rounds = rounds;
	run.salt = salt;
	run.lanes = (u32)lanes;
	for (u32 lane = 0; lane < lanes; lane++)
		run_user(user_zero, (u64)lane_buffer(lane, 1), LANE_BYTES / 8, 0, 0);
	status = advance_all(&longest);
	if (status == S_NONE)
		print("fail blk.overlap\n");
	else if (status)
		print("fail blk.overlap status=%u\n", (u64)status);
	else
		print("ok blk.overlap requests=%u longest-us=%u\n", 2 * lanes * rounds,
		      longest / 1000);
}
