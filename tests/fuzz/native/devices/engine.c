// The device's thread runs by a call: for a while, or until it has done a control call.
#include <errno.h>

#include "world.h"

#define MAX_POLLS 6 // of one slice

static int create(void *(*run)(void *), void *argument)
{
	static const int errors[] = {EAGAIN};
	int error = world.flags & F_FAIL ? fuzz_failure(errors, 1) : 0;

	CHECK(!world.has_thread && argument == world.device);
	world.run = run;
	world.has_thread = !error;
	return error;
}

static void join(void)
{
	CHECK(world.has_thread && world.device->stop);
	world.has_thread = false;
}

static void epoch_begin(void)
{
	guest_epoch_begin();
	for (unsigned int i = 0; i < world.count; i++) {
		if (!ledgers[i].vq)
			continue;
		guest_allow_ring(&world.rings[i]);
		ledger_allow(i);
	}
	if (fuzz_kind.epoch)
		fuzz_kind.epoch();
	world.looked = ledger_calls;
}

static void run(void)
{
	CHECK(!world.runs && world.has_thread);
	world.runs = true;
	world.paused = false;
	world.polls = 0;
	epoch_begin();
	world.run(world.device);
	guest_epoch_end();
	world.runs = false;
	if (world.paused)
		world.device->stop = false;
}

// Its thread leaves us here, and goes on here later.
static void pause_thread(void)
{
	world.paused = world.device->stop = true;
}

static int wait_a_little(struct pollfd *fds, nfds_t count, const struct timespec *limit)
{
	int ready;

	guest_epoch_end();
	CHECK(world.runs);
	CHECK(ledger_calls - world.looked <= (world.count + 4) * fuzz_kind.longest);
	world.polls++;
	if (world.calling ? !world.device->call : world.polls > MAX_POLLS || !fuzz_tape_left)
		pause_thread();
	else if (!world.calling)
		for (unsigned int acts = next_byte() % 4; acts; acts--)
			act();
	CHECK(world.polls < 100);
	ready = fuzz_look(fds, count, limit);
	if (!ready && !limit && !world.calling)
		pause_thread(); // else it would sleep for ever
	epoch_begin();
	return ready;
}

static void cond_wait(pthread_mutex_t *mutex)
{
	world.calling = true;
	run();
	world.calling = false;
	CHECK(!world.device->call);
}

void slice(void)
{
	if (!world.device->running)
		return;
	run();
}

void use_system(void)
{
	fuzz_system = (struct fuzz_system){
		.create = create,
		.join = join,
		.cond_wait = cond_wait,
		.ppoll = wait_a_little,
		.now = 1000000000ull,
	};
}
