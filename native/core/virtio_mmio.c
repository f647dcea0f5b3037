// The registers of one virtio-mmio slot, version 2 (virtio 1.2, 4.2.2), but for those where
// something happens: Status, QueueReady, QueueNotify and writes of the config space are Python's.
#include "core/core.h"

#include <linux/virtio_mmio.h>
#include <string.h>

#define MAGIC 0x74726976
#define VERSION 2
#define VENDOR 0

static int read_identity(struct sv_virtio *device, uint32_t offset, uint32_t *value)
{
	switch (offset) {
	case VIRTIO_MMIO_MAGIC_VALUE: *value = MAGIC; break;
	case VIRTIO_MMIO_VERSION: *value = VERSION; break;
	case VIRTIO_MMIO_DEVICE_ID: *value = device->device_id; break;
	case VIRTIO_MMIO_VENDOR_ID: *value = VENDOR; break;
	default: *value = 0; break;
	}
	return SV_SERVED;
}

static int read_register(struct sv_virtio *device, uint32_t offset, uint32_t *value)
{
	struct sv_virtio_queue *queue = sv_virtio_selected(device);

	switch (offset) {
	case VIRTIO_MMIO_DEVICE_FEATURES:
		return sv_virtio_offered(device, value) ? SV_SERVED : SV_FORWARD;
	case VIRTIO_MMIO_QUEUE_NUM_MAX: *value = queue ? queue->size_max : 0; break;
	case VIRTIO_MMIO_QUEUE_READY: *value = queue ? sv_load(&queue->ready) : 0; break;
	case VIRTIO_MMIO_INTERRUPT_STATUS: *value = sv_virtio_interrupt(device); break;
	case VIRTIO_MMIO_STATUS: *value = sv_load(&device->status); break;
	// The length of a shared memory region that doesn't exist is -1 (4.2.2); we have none.
	case VIRTIO_MMIO_SHM_LEN_LOW:
	case VIRTIO_MMIO_SHM_LEN_HIGH:
	case VIRTIO_MMIO_SHM_BASE_LOW:
	case VIRTIO_MMIO_SHM_BASE_HIGH: *value = UINT32_MAX; break;
	case VIRTIO_MMIO_CONFIG_GENERATION:
		// Before any read of the config space that comes after it.
		*value = atomic_load_explicit(&device->generation, memory_order_acquire);
		break;
	default: return read_identity(device, offset, value);
	}
	return SV_SERVED;
}

static void draft_half(struct sv_virtio *device, uint32_t half, uint32_t value)
{
	struct sv_virtio_queue *queue = sv_virtio_selected_draft(device);

	if (queue)
		sv_store(&queue->halves[half], value);
}

static void draft_size(struct sv_virtio *device, uint32_t value)
{
	struct sv_virtio_queue *queue = sv_virtio_selected_draft(device);

	if (queue)
		sv_store(&queue->size, value);
}

static int write_register(struct sv_virtio *device, uint32_t offset, uint32_t value)
{
	switch (offset) {
	case VIRTIO_MMIO_STATUS:
	case VIRTIO_MMIO_QUEUE_READY: return SV_FORWARD;
	case VIRTIO_MMIO_DEVICE_FEATURES_SEL: sv_store(&device->device_features_sel, value); break;
	case VIRTIO_MMIO_DRIVER_FEATURES: sv_virtio_draft_features(device, value); break;
	case VIRTIO_MMIO_DRIVER_FEATURES_SEL: sv_store(&device->driver_features_sel, value); break;
	case VIRTIO_MMIO_QUEUE_SEL: sv_store(&device->queue_sel, value); break;
	case VIRTIO_MMIO_QUEUE_NUM: draft_size(device, value); break;
	case VIRTIO_MMIO_INTERRUPT_ACK: sv_virtio_acknowledge(device, value); break;
	case VIRTIO_MMIO_QUEUE_DESC_LOW: draft_half(device, 0, value); break;
	case VIRTIO_MMIO_QUEUE_DESC_HIGH: draft_half(device, 1, value); break;
	case VIRTIO_MMIO_QUEUE_AVAIL_LOW: draft_half(device, 2, value); break;
	case VIRTIO_MMIO_QUEUE_AVAIL_HIGH: draft_half(device, 3, value); break;
	case VIRTIO_MMIO_QUEUE_USED_LOW: draft_half(device, 4, value); break;
	case VIRTIO_MMIO_QUEUE_USED_HIGH: draft_half(device, 5, value); break;
	}
	return SV_SERVED;
}

static int access_config(struct sv_virtio *device, uint32_t offset, uint32_t size, bool write,
			 uint8_t *data)
{
	if (device->device_id)
		return !write && sv_virtio_config(device, offset, size, data) ? SV_SERVED :
										SV_FORWARD;
	if (!write)
		memset(data, 0, size);
	return SV_SERVED;
}

int sv_virtio_mmio(struct sv_virtio *device, uint32_t offset, uint32_t size, bool write,
		   uint8_t *data)
{
	// 4.2.2.2: registers are for aligned accesses of 32 bits.
	bool odd = size != sizeof(uint32_t) || offset % sizeof(uint32_t);
	uint32_t value = 0;
	int ret = SV_SERVED;

	if (offset >= SV_VIRTIO_MMIO_SIZE || size > SV_VIRTIO_MMIO_SIZE - offset)
		return SV_FORWARD; // not a slot's alone
	if (offset >= VIRTIO_MMIO_CONFIG)
		return access_config(device, offset - VIRTIO_MMIO_CONFIG, size, write, data);
	if (write) {
		if (!device->device_id)
			return SV_SERVED;
		// What comes here has missed the ioeventfd: a kick must not be lost.
		if (offset == VIRTIO_MMIO_QUEUE_NOTIFY)
			return SV_FORWARD;
		if (odd)
			return SV_SERVED;
		memcpy(&value, data, sizeof(value));
		return write_register(device, offset, value);
	}
	if (!odd)
		ret = device->device_id ? read_register(device, offset, &value) :
					  read_identity(device, offset, &value);
	if (ret == SV_SERVED) {
		memset(data, 0, size);
		memcpy(data, &value, size < sizeof(value) ? size : sizeof(value));
	}
	return ret;
}
