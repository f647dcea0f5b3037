// Set-up and control calls.
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "ring/internal.h"

#define LAST_BATCHES 4 // that a queue is served before it stops

static int open_events(struct sv_ring_device *device)
{
	device->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	device->notify_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return device->wake_fd < 0 || device->notify_fd < 0 ? -EMFILE : 0;
}

struct sv_ring_device *sv_ring_create(const struct sv_ring_kind *kind, void *own,
				      unsigned int queues, unsigned int queue_size,
				      void *counters, size_t record_bytes, int *error)
{
	struct sv_ring_device *device;

	*error = -EINVAL;
	if (!queues || queues > SV_RING_MAX_QUEUES || !queue_size ||
	    queue_size > SV_VIRTQ_MAX_SIZE)
		return NULL;
	*error = -ENOMEM;
	device = calloc(1, sizeof(*device));
	if (!device)
		return NULL;
	pthread_mutex_init(&device->lock, NULL);
	pthread_cond_init(&device->done, NULL);
	device->max_size = queue_size;
	device->wake_fd = device->notify_fd = -1;
	for (unsigned int i = 0; i < SV_RING_MAX_FDS; i++)
		device->awaited[i].fd = -1;
	device->chain = malloc(sizeof(*device->chain));
	device->queues = calloc(queues, sizeof(*device->queues));
	if (device->chain && device->queues)
		*error = open_events(device);
	if (*error) {
		sv_ring_destroy(device);
		return NULL;
	}
	device->count = queues;
	for (unsigned int i = 0; i < queues; i++) {
		struct sv_ring_queue *queue = &device->queues[i];

		queue->kick_fd = queue->call_fd = queue->err_fd = -1;
		queue->counters = (void *)((uint8_t *)counters + i * record_bytes);
	}
	device->kind = kind;
	device->own = own;
	return device;
}

void sv_ring_destroy(struct sv_ring_device *device)
{
	for (unsigned int i = 0; i < device->count; i++)
		sv_ring_stop(device, i);
	if (device->kind && device->kind->destroy)
		device->kind->destroy(device);
	sv_memory_clear(&device->memory);
	if (device->wake_fd >= 0)
		close(device->wake_fd);
	if (device->notify_fd >= 0)
		close(device->notify_fd);
	pthread_cond_destroy(&device->done);
	pthread_mutex_destroy(&device->lock);
	free(device->queues);
	free(device->chain);
	free(device);
}

int sv_ring_call(struct sv_ring_device *device, sv_ring_call_fn call, void *argument)
{
	int result;

	if (!device->running)
		return call(device, argument);
	pthread_mutex_lock(&device->lock);
	device->argument = argument;
	device->call = call;
	eventfd_write(device->wake_fd, 1);
	while (device->call)
		pthread_cond_wait(&device->done, &device->lock);
	result = device->result;
	pthread_mutex_unlock(&device->lock);
	return result;
}

int sv_ring_add_region(struct sv_ring_device *device, uint64_t guest_addr, uint64_t size,
		       uint64_t offset, int fd)
{
	if (device->running)
		return -EBUSY;
	return sv_memory_add(&device->memory, guest_addr, size, offset, fd);
}

int sv_ring_remove_region(struct sv_ring_device *device, uint64_t guest_addr, uint64_t size)
{
	if (device->running)
		return -EBUSY;
	return sv_memory_remove(&device->memory, guest_addr, size);
}

int sv_ring_clear_regions(struct sv_ring_device *device)
{
	if (device->running)
		return -EBUSY;
	sv_memory_clear(&device->memory);
	return 0;
}

int sv_ring_set_features(struct sv_ring_device *device, uint64_t features)
{
	if (device->running)
		return -EBUSY;
	device->features = features;
	if (device->kind->negotiated)
		device->kind->negotiated(device);
	return 0;
}

int sv_ring_reset(struct sv_ring_device *device)
{
	if (device->running)
		return -EBUSY;
	device->features = 0;
	if (device->kind->reset)
		device->kind->reset(device);
	return 0;
}

struct request {
	unsigned int index;
	int fd;
	const struct sv_ring_place *place;
	const char *reason;
};

static int set_call(struct sv_ring_queue *queue, int fd)
{
	int copy = -1;

	if (fd >= 0) {
		copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
		if (copy < 0)
			return -errno;
	}
	if (queue->call_fd >= 0)
		close(queue->call_fd);
	queue->call_fd = copy;
	return 0;
}

static void close_fds(struct sv_ring_queue *queue)
{
	set_call(queue, -1);
	if (queue->err_fd >= 0)
		close(queue->err_fd);
	queue->err_fd = -1;
	queue->kick_fd = -1;
}

static int start(struct sv_ring_device *device, void *argument)
{
	const struct request *request = argument;
	const struct sv_ring_place *place = request->place;
	struct sv_ring_queue *queue = &device->queues[request->index];
	int ret = sv_virtq_start(&queue->vq, &device->memory, place->size, place->desc,
				 place->avail, place->used, device->features, place->base, NULL);

	if (ret < 0)
		return ret;
	ret = set_call(queue, place->call_fd);
	if (ret < 0)
		return ret;
	if (place->err_fd >= 0) {
		queue->err_fd = fcntl(place->err_fd, F_DUPFD_CLOEXEC, 0);
		if (queue->err_fd < 0) {
			ret = -errno;
			close_fds(queue);
			return ret;
		}
	}
	queue->kick_fd = place->kick_fd;
	queue->counters->broken = 0;
	queue->listens = queue->call_due = queue->wants_kick = false;
	queue->wait_until = 0;
	sv_virtq_disable_kicks(&queue->vq);
	queue->running = queue->due = true;
	if (device->kind->started)
		device->kind->started(device, request->index);
	return 0;
}

static void halt(struct sv_ring_device *device, unsigned int index)
{
	struct sv_ring_queue *queue = &device->queues[index];

	if (device->kind->stopping)
		device->kind->stopping(device, index);
	queue->running = queue->due = false;
	sv_virtq_stop(&queue->vq);
	close_fds(queue);
}

static int stop(struct sv_ring_device *device, void *argument)
{
	const struct request *request = argument;
	struct sv_ring_queue *queue = &device->queues[request->index];

	// What the driver has just kicked: its last words before it ends count.
	queue->due = !queue->vq.broken;
	for (unsigned int i = 0; i < LAST_BATCHES && queue->due; i++)
		sv_ring_serve(device, request->index);
	halt(device, request->index);
	device->stop = device->running == 1;
	return queue->vq.last_avail;
}

static int change_call(struct sv_ring_device *device, void *argument)
{
	const struct request *request = argument;

	return set_call(&device->queues[request->index], request->fd);
}

static int find_reason(struct sv_ring_device *device, void *argument)
{
	struct request *request = argument;
	const struct sv_ring_queue *queue = &device->queues[request->index];

	request->reason = queue->running && queue->vq.broken ? queue->vq.reason : NULL;
	return 0;
}

int sv_ring_start(struct sv_ring_device *device, unsigned int index,
		  const struct sv_ring_place *place)
{
	struct request request = {.index = index, .place = place};
	int ret;

	if (index >= device->count || place->size > device->max_size)
		return -EINVAL;
	if (device->queues[index].running)
		return -EBUSY;
	ret = sv_ring_call(device, start, &request);
	if (ret < 0)
		return ret;
	if (!device->running) {
		ret = sv_ring_begin_thread(device);
		if (ret < 0) {
			halt(device, index);
			return ret;
		}
	}
	device->running++;
	return 0;
}

int sv_ring_stop(struct sv_ring_device *device, unsigned int index)
{
	struct request request = {.index = index};
	int base;

	if (index >= device->count || !device->queues[index].running)
		return -EINVAL;
	base = sv_ring_call(device, stop, &request);
	device->running--;
	if (!device->running)
		pthread_join(device->thread, NULL);
	return base;
}

int sv_ring_set_call(struct sv_ring_device *device, unsigned int index, int fd)
{
	struct request request = {.index = index, .fd = fd};

	return index < device->count ? sv_ring_call(device, change_call, &request) : -EINVAL;
}

const char *sv_ring_broken(struct sv_ring_device *device, unsigned int index)
{
	struct request request = {.index = index};

	if (index < device->count)
		sv_ring_call(device, find_reason, &request);
	return request.reason;
}

int sv_ring_notify_fd(const struct sv_ring_device *device)
{
	return device->notify_fd;
}

void sv_ring_push(struct sv_ring_device *device, unsigned int index, uint16_t head,
		  uint32_t written)
{
	struct sv_ring_queue *queue = &device->queues[index];

	sv_virtq_push(&queue->vq, head, written);
	queue->counters->chains++;
	queue->call_due = true;
}

void sv_ring_due(struct sv_ring_device *device, unsigned int index)
{
	struct sv_ring_queue *queue = &device->queues[index];

	if (queue->running && !queue->vq.broken)
		queue->due = true;
}

void sv_ring_await(struct sv_ring_device *device, unsigned int slot, int fd, short events)
{
	device->awaited[slot] = (struct pollfd){.fd = events ? fd : -1, .events = events};
}

void sv_ring_notify(struct sv_ring_device *device)
{
	eventfd_write(device->notify_fd, 1);
}
