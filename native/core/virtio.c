// The state of one virtio device that its driver sees and drafts (virtio.h).
#include "core/virtio.h"

#include <errno.h>
#include <linux/virtio_config.h>
#include <stdlib.h>

int sv_virtio_create(uint32_t device_id, const uint32_t *queue_sizes, uint32_t queue_count,
		     struct sv_virtio **out)
{
	struct sv_virtio *device;

	if (queue_count > SV_VIRTIO_MAX_QUEUES)
		return -EINVAL;
	device = calloc(1, sizeof(*device) + queue_count * sizeof(device->queues[0]));
	if (!device)
		return -ENOMEM;
	device->device_id = device_id;
	device->queue_count = queue_count;
	for (uint32_t i = 0; i < queue_count; i++)
		device->queues[i].size_max = queue_sizes[i];
	device->config_version = 1;
	device->references = 1;
	*out = device;
	return 0;
}

void sv_virtio_get(struct sv_virtio *device)
{
	atomic_fetch_add(&device->references, 1);
}

void sv_virtio_put(struct sv_virtio *device)
{
	if (device && atomic_fetch_sub(&device->references, 1) == 1)
		free(device);
}

// ---- Python's --------------------------------------------------------------------------------

void sv_virtio_set_status(struct sv_virtio *device, uint32_t status)
{
	sv_store(&device->status, status);
}

void sv_virtio_set_generation(struct sv_virtio *device, uint32_t generation)
{
	atomic_store_explicit(&device->generation, generation, memory_order_release);
}

void sv_virtio_set_offered(struct sv_virtio *device, uint64_t features)
{
	atomic_store_explicit(&device->offered, features, memory_order_relaxed);
	atomic_store_explicit(&device->offered_known, 1, memory_order_release);
}

static void forget_config(struct sv_virtio *device)
{
	uint64_t version = atomic_load_explicit(&device->config_version, memory_order_relaxed);

	if (!(version & 1))
		atomic_store_explicit(&device->config_version, version + 1, memory_order_relaxed);
}

// A sequence lock whose readers never wait: who sees it change asks Python. A reader that saw
// any of the new bytes sees, by the two fences, that the version is another.
int sv_virtio_set_config(struct sv_virtio *device, const uint8_t *config, uint32_t length)
{
	uint64_t version;

	if (length > SV_VIRTIO_CONFIG_SIZE)
		return -EINVAL;
	forget_config(device);
	version = atomic_load_explicit(&device->config_version, memory_order_relaxed);
	atomic_thread_fence(memory_order_release);
	for (uint32_t i = 0; i < SV_VIRTIO_CONFIG_SIZE; i++)
		atomic_store_explicit(&device->config[i], i < length ? config[i] : 0,
				      memory_order_relaxed);
	atomic_store_explicit(&device->config_version, version + 1, memory_order_release);
	return 0;
}

void sv_virtio_forget(struct sv_virtio *device)
{
	sv_store(&device->offered_known, 0);
	forget_config(device);
}

uint64_t sv_virtio_driver_features(struct sv_virtio *device)
{
	return sv_load(&device->driver_features[0]) | (uint64_t)sv_load(&device->driver_features[1]) << 32;
}

uint32_t sv_virtio_device_features_sel(struct sv_virtio *device)
{
	return sv_load(&device->device_features_sel);
}

uint32_t sv_virtio_queue_sel(struct sv_virtio *device)
{
	return sv_load(&device->queue_sel);
}

static uint64_t address(struct sv_virtio_queue *queue, uint32_t part)
{
	return sv_load(&queue->halves[2 * part]) | (uint64_t)sv_load(&queue->halves[2 * part + 1]) << 32;
}

int sv_virtio_queue(struct sv_virtio *device, uint32_t index, struct sv_virtio_draft *draft)
{
	struct sv_virtio_queue *queue;

	if (index >= device->queue_count)
		return -EINVAL;
	queue = &device->queues[index];
	draft->size = sv_load(&queue->size);
	draft->desc = address(queue, 0);
	draft->avail = address(queue, 1);
	draft->used = address(queue, 2);
	return 0;
}

int sv_virtio_set_ready(struct sv_virtio *device, uint32_t index, bool ready)
{
	if (index >= device->queue_count)
		return -EINVAL;
	sv_store(&device->queues[index].ready, ready);
	return 0;
}

void sv_virtio_reset(struct sv_virtio *device)
{
	sv_store(&device->device_features_sel, 0);
	sv_store(&device->driver_features_sel, 0);
	sv_store(&device->queue_sel, 0);
	sv_store(&device->driver_features[0], 0);
	sv_store(&device->driver_features[1], 0);
	for (uint32_t i = 0; i < device->queue_count; i++) {
		struct sv_virtio_queue *queue = &device->queues[i];

		sv_store(&queue->size, 0);
		sv_store(&queue->ready, 0);
		for (int half = 0; half < 6; half++)
			sv_store(&queue->halves[half], 0);
	}
	sv_store(&device->live, 0);
	sv_store(&device->interrupt, 0);
}

void sv_virtio_set_live(struct sv_virtio *device, bool live)
{
	sv_store(&device->live, live);
}

void sv_virtio_raise(struct sv_virtio *device, uint32_t bits)
{
	// Before the interrupt, which the caller raises by a system call.
	atomic_fetch_or(&device->interrupt, bits);
}

// ---- the guest's -----------------------------------------------------------------------------

uint32_t sv_virtio_interrupt(struct sv_virtio *device)
{
	return sv_load(&device->interrupt) | sv_load(&device->live);
}

void sv_virtio_acknowledge(struct sv_virtio *device, uint32_t bits)
{
	atomic_fetch_and(&device->interrupt, ~bits);
}

bool sv_virtio_offered(struct sv_virtio *device, uint32_t *half)
{
	uint32_t sel = sv_load(&device->device_features_sel);

	*half = 0;
	if (sel > 1)
		return true; // there are 64
	if (!atomic_load_explicit(&device->offered_known, memory_order_acquire))
		return false;
	*half = (uint32_t)(atomic_load_explicit(&device->offered, memory_order_relaxed) >>
			   32 * sel);
	return true;
}

bool sv_virtio_config(struct sv_virtio *device, uint32_t offset, uint32_t size, uint8_t *data)
{
	uint64_t version = atomic_load_explicit(&device->config_version, memory_order_acquire);

	if (version & 1)
		return false;
	for (uint32_t i = 0; i < size; i++)
		data[i] = atomic_load_explicit(&device->config[offset + i], memory_order_relaxed);
	atomic_thread_fence(memory_order_acquire);
	return atomic_load_explicit(&device->config_version, memory_order_relaxed) == version;
}

// virtio 1.2, 3.1.1: features are written between DRIVER and FEATURES_OK.
void sv_virtio_draft_features(struct sv_virtio *device, uint32_t half)
{
	uint32_t sel = sv_load(&device->driver_features_sel);
	uint32_t status = sv_load(&device->status);

	if (sel <= 1 && status & VIRTIO_CONFIG_S_DRIVER && !(status & VIRTIO_CONFIG_S_FEATURES_OK))
		sv_store(&device->driver_features[sel], half);
}

struct sv_virtio_queue *sv_virtio_selected(struct sv_virtio *device)
{
	uint32_t sel = sv_load(&device->queue_sel);

	return sel < device->queue_count ? &device->queues[sel] : NULL;
}

// Set up: after FEATURES_OK, before DRIVER_OK (virtio 1.2, 3.1.1), while it isn't ready
// (4.2.2.2).
struct sv_virtio_queue *sv_virtio_selected_draft(struct sv_virtio *device)
{
	struct sv_virtio_queue *queue = sv_virtio_selected(device);
	uint32_t status = sv_load(&device->status);

	if (!queue || sv_load(&queue->ready) || !(status & VIRTIO_CONFIG_S_FEATURES_OK) ||
	    status & VIRTIO_CONFIG_S_DRIVER_OK)
		return NULL;
	return queue;
}
