// A vhost-user front end in C, as much as a load generator needs: it stands for a guest.
//
// RAM in a memfd, split rings with indirect descriptors and event index.  It knows nothing of the
// back end but the published protocol, so that rivals are measured with the same hand.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

#include <linux/virtio_ring.h>

// ---- what programs share (common.c) ---------------------------------------------------------------
extern const char program[]; // the program's name, for its last words

_Noreturn void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
uint64_t now_ns(void);
// An option's value; fails if it is no number.
uint64_t number(const char *name, const char *text);
// Run the calling thread on that CPU; -1: on any.
void pin_to(int cpu);

struct guest_memory {
	int fd;
	uint8_t *base; // guest physical address 0
	uint64_t size;
};

void make_memory(struct guest_memory *memory, uint64_t size);

// ---- the protocol (vhost.c) -----------------------------------------------------------------------
struct vhost {
	int socket;
	uint64_t features;
	bool reply_ack, has_config;
};

void vhost_connect(struct vhost *vhost, const char *path, uint64_t wanted);
// The first bytes of the configuration space; fails if the back end has none.
void vhost_read_config(struct vhost *vhost, void *config, uint32_t size);
void vhost_set_memory(struct vhost *vhost, const struct guest_memory *memory);

struct ring;
void vhost_start_ring(struct vhost *vhost, const struct guest_memory *memory,
		      const struct ring *ring, unsigned int index);
void vhost_stop_ring(struct vhost *vhost, unsigned int index);

// ---- the driver's ring (ring.c) -------------------------------------------------------------------
struct ring {
	unsigned int size;
	bool event_index, indirect;
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	uint64_t desc_addr, avail_addr, used_addr;
	uint16_t avail_next;   // what the back end may take
	uint16_t avail_seen;   // avail index of the last kick decision
	uint16_t used_next;
	unsigned int per_chain; // descriptors that a chain may need
	int kick_fd, call_fd;
	int epoll_fd; // waits for calls
	uint64_t kicks, calls;
};

void ring_init(struct ring *ring, struct guest_memory *memory, uint64_t address, unsigned int size);
uint64_t ring_bytes(unsigned int size);
// Make a chain available under the number `slot`; `table` is where its indirect table may lie.
void ring_add(struct ring *ring, struct guest_memory *memory, unsigned int slot, uint64_t table,
	      const struct vring_desc *parts, unsigned int count);
// Make the chain that `slot` was last time available again.
void ring_add_again(struct ring *ring, unsigned int slot);
// Kick for what was added, if the back end wants it.
void ring_kick(struct ring *ring);
// The next finished slot, or -1; `written` (if it isn't NULL): bytes that the back end wrote.
int ring_take(struct ring *ring, uint32_t *written);
// Ask for a call once `ahead` more slots are finished than are now (0: the next one); true if they
// are already.
bool ring_arm(struct ring *ring, uint16_t ahead);
// Wait for a call; false if none came within `limit_ms`.
bool ring_wait(struct ring *ring, int limit_ms);

// ---- what it costs (cost.c) -----------------------------------------------------------------------
struct cost {
	unsigned int count;
	clockid_t clocks[64];
};

// The CPU clocks of `pid` and of all its descendants as of now.
void cost_open(struct cost *cost, pid_t pid);
uint64_t cost_ns(const struct cost *cost);
