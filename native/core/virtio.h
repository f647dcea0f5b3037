// What a driver sees and sets of one virtio device, whatever the transport (virtio 1.2, 2):
// served on the vCPUs' threads, looked after by Python.
//
// Who writes what: the guest its selectors, features and queues, which are no more than a draft
// (any vCPU, at any time, as often as it likes); Python the rest, one thread at a time.  Python
// takes one copy of what was drafted (sv_virtio_driver_features(), sv_virtio_queue()), checks
// that, and never looks at the draft again.
//
// Fields are atomics, so that no value is torn; relaxed, because none says anything about
// another.  An order between the accesses of two vCPUs is the guest's to make, by its memory,
// and between that and these fields there is a VM exit.  What does depend on each other says so.
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

static inline uint32_t sv_load(_Atomic uint32_t *field)
{
	return atomic_load_explicit(field, memory_order_relaxed);
}

static inline void sv_store(_Atomic uint32_t *field, uint32_t value)
{
	atomic_store_explicit(field, value, memory_order_relaxed);
}

// Also all that a virtio-mmio slot has room for.
#define SV_VIRTIO_CONFIG_SIZE 256
#define SV_VIRTIO_MAX_QUEUES 1024

struct sv_virtio_queue {
	uint32_t size_max;
	_Atomic uint32_t size;
	// Low and high halves of the descriptor table, the driver's and the device's area.
	_Atomic uint32_t halves[6];
	_Atomic uint32_t ready; // Python's
};

// The state as a whole: nothing in it points anywhere.
struct sv_virtio {
	_Atomic uint32_t references;
	uint32_t device_id; // 0: nothing but a placeholder (virtio 1.2, 4.2.3.1.1)
	uint32_t queue_count;
	_Atomic uint32_t status;     // Python's
	_Atomic uint32_t generation; // Python's
	_Atomic uint32_t device_features_sel;
	_Atomic uint32_t driver_features_sel;
	_Atomic uint32_t queue_sel;
	_Atomic uint32_t driver_features[2];
	_Atomic uint32_t interrupt;
	_Atomic uint32_t live; // bit 0 of the interrupt status reads as 1
	// What Python has learnt of the device, until it is forgotten.
	_Atomic uint32_t offered_known;
	_Atomic uint64_t offered;
	_Atomic uint64_t config_version; // odd: unknown
	_Atomic uint8_t config[SV_VIRTIO_CONFIG_SIZE];
	struct sv_virtio_queue queues[];
};

// What the driver has drafted for a queue.
struct sv_virtio_draft {
	uint32_t size;
	uint64_t desc;
	uint64_t avail;
	uint64_t used;
};

// With one reference. -EINVAL: too many queues.
int sv_virtio_create(uint32_t device_id, const uint32_t *queue_sizes, uint32_t queue_count,
		     struct sv_virtio **out);
void sv_virtio_get(struct sv_virtio *device);
void sv_virtio_put(struct sv_virtio *device);

// ---- Python's: one thread at a time, but for sv_virtio_raise() ------------------------------

void sv_virtio_set_status(struct sv_virtio *device, uint32_t status);
// Whoever reads the new generation reads no config that was known before it.
void sv_virtio_set_generation(struct sv_virtio *device, uint32_t generation);
// Features on offer and config space are as told, until they are forgotten.
void sv_virtio_set_offered(struct sv_virtio *device, uint64_t features);
// -EINVAL: longer than there is room; what isn't told is 0.
int sv_virtio_set_config(struct sv_virtio *device, const uint8_t *config, uint32_t length);
void sv_virtio_forget(struct sv_virtio *device);
// One reading of each field.
uint64_t sv_virtio_driver_features(struct sv_virtio *device);
uint32_t sv_virtio_device_features_sel(struct sv_virtio *device);
uint32_t sv_virtio_queue_sel(struct sv_virtio *device);
// -EINVAL: there is no such queue.
int sv_virtio_queue(struct sv_virtio *device, uint32_t index, struct sv_virtio_draft *draft);
int sv_virtio_set_ready(struct sv_virtio *device, uint32_t index, bool ready);
// No selector, feature, queue, interrupt is left; status, generation and what was learnt stay.
void sv_virtio_reset(struct sv_virtio *device);

void sv_virtio_set_live(struct sv_virtio *device, bool live);
void sv_virtio_raise(struct sv_virtio *device, uint32_t bits);

// ---- the guest's ----------------------------------------------------------------------------

uint32_t sv_virtio_interrupt(struct sv_virtio *device);
void sv_virtio_acknowledge(struct sv_virtio *device, uint32_t bits);
// False: Python must be asked.
bool sv_virtio_offered(struct sv_virtio *device, uint32_t *half);
// `offset` + `size` must not be more than there is.
bool sv_virtio_config(struct sv_virtio *device, uint32_t offset, uint32_t size, uint8_t *data);
void sv_virtio_draft_features(struct sv_virtio *device, uint32_t half);
// The selected queue; NULL if there is none.
struct sv_virtio_queue *sv_virtio_selected(struct sv_virtio *device);
// As above, if it may be set up now.
struct sv_virtio_queue *sv_virtio_selected_draft(struct sv_virtio *device);

// ---- virtio_mmio.c --------------------------------------------------------------------------

#define SV_VIRTIO_MMIO_SIZE 0x200

// An access of `size` bytes, at most 8, at `offset` of a slot: SV_SERVED or SV_FORWARD.
int sv_virtio_mmio(struct sv_virtio *device, uint32_t offset, uint32_t size, bool write,
		   uint8_t *data);
