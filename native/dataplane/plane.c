#include "dataplane/dataplane.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "dataplane/queue.h"
#include "include/clock.h"

struct sv_plane {
	struct sv_disk disk;
	struct sv_memory memory;
	struct sv_pool pool;
	uint8_t *inflight; // mapping, or NULL
	size_t inflight_bytes;
	size_t inflight_start;
	unsigned int inflight_queues;
	unsigned int inflight_size;
	unsigned int max_size;
	unsigned int count;
	struct sv_queue queues[];
};

static int init_disk_lock(struct sv_disk *disk)
{
	pthread_rwlockattr_t attr;
	int ret;

	pthread_rwlockattr_init(&attr);
	// A partial write must not starve behind a stream of whole ones.
	pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	ret = pthread_rwlock_init(&disk->partial, &attr);
	pthread_rwlockattr_destroy(&attr);
	return -ret;
}

static bool is_disk_valid(const struct sv_disk *disk)
{
	// Powers of two, and blocks that a bounce buffer can hold.
	return disk->align && !(disk->align & (disk->align - 1)) && disk->align <= 65536 &&
	       disk->memory_align && !(disk->memory_align & (disk->memory_align - 1)) &&
	       disk->memory_align <= 65536 && disk->capacity <= INT64_MAX / SV_BLK_SECTOR;
}

struct sv_plane *sv_plane_create(const struct sv_disk *disk, unsigned int queues,
				 unsigned int queue_size, enum sv_engine_kind engine,
				 struct sv_blk_counters *counters, int *error)
{
	struct sv_plane *plane;

	*error = -EINVAL;
	if (!queues || queues > 1024 || !queue_size || queue_size > SV_VIRTQ_MAX_SIZE ||
	    !is_disk_valid(disk))
		return NULL;
	*error = -ENOMEM;
	plane = calloc(1, sizeof(*plane) + queues * sizeof(struct sv_queue));
	if (!plane)
		return NULL;
	plane->disk = *disk;
	plane->max_size = queue_size;
	*error = init_disk_lock(&plane->disk);
	if (*error)
		goto free_plane;
	sv_throttle_init(&plane->disk.throttle);
	plane->disk.end = UINT64_MAX;
	plane->disk.failures = (struct sv_blk_failures){.event_fd = -1};
	*error = sv_pool_init(&plane->pool, disk->fd);
	if (*error)
		goto destroy_lock;
	for (; plane->count < queues; plane->count++) {
		*error = sv_queue_init(&plane->queues[plane->count], &plane->disk, engine,
				       queue_size, &plane->pool, &counters[plane->count]);
		if (*error)
			goto deinit_queues;
	}
	return plane;

deinit_queues:
	while (plane->count--)
		sv_queue_deinit(&plane->queues[plane->count]);
	sv_pool_deinit(&plane->pool);
destroy_lock:
	sv_throttle_deinit(&plane->disk.throttle);
	pthread_rwlock_destroy(&plane->disk.partial);
free_plane:
	free(plane);
	return NULL;
}

static void unmap_inflight(struct sv_plane *plane)
{
	if (plane->inflight)
		munmap(plane->inflight, plane->inflight_bytes);
	plane->inflight = NULL;
}

void sv_plane_destroy(struct sv_plane *plane)
{
	for (unsigned int i = 0; i < plane->count; i++)
		sv_queue_end(&plane->queues[i]);
	sv_pool_deinit(&plane->pool);
	for (unsigned int i = 0; i < plane->count; i++)
		sv_queue_deinit(&plane->queues[i]);
	sv_throttle_deinit(&plane->disk.throttle);
	pthread_rwlock_destroy(&plane->disk.partial);
	sv_memory_clear(&plane->memory);
	unmap_inflight(plane);
	free(plane);
}

static bool is_running(const struct sv_plane *plane)
{
	for (unsigned int i = 0; i < plane->count; i++) {
		if (plane->queues[i].running)
			return true;
	}
	return false;
}

int sv_plane_add_region(struct sv_plane *plane, uint64_t guest_addr, uint64_t size,
			uint64_t offset, int fd)
{
	if (is_running(plane))
		return -EBUSY;
	return sv_memory_add(&plane->memory, guest_addr, size, offset, fd);
}

int sv_plane_remove_region(struct sv_plane *plane, uint64_t guest_addr, uint64_t size)
{
	if (is_running(plane))
		return -EBUSY;
	return sv_memory_remove(&plane->memory, guest_addr, size);
}

int sv_plane_clear_regions(struct sv_plane *plane)
{
	if (is_running(plane))
		return -EBUSY;
	sv_memory_clear(&plane->memory);
	return 0;
}

int sv_plane_sync(struct sv_plane *plane)
{
	if (plane->disk.readonly)
		return 0;
	return fdatasync(plane->disk.fd) < 0 ? -errno : 0;
}

int sv_plane_set_writeback(struct sv_plane *plane, bool writeback)
{
	bool was = __atomic_exchange_n(&plane->disk.writeback, writeback, __ATOMIC_ACQ_REL);

	return was && !writeback ? sv_plane_sync(plane) : 0;
}

int sv_plane_set_inflight(struct sv_plane *plane, int fd, uint64_t offset, uint64_t size,
			  unsigned int queues, unsigned int queue_size)
{
	uint64_t slack = offset & ((uint64_t)sysconf(_SC_PAGESIZE) - 1);
	void *mapping;

	if (is_running(plane))
		return -EBUSY;
	if (fd < 0) {
		unmap_inflight(plane);
		return 0;
	}
	if (queue_size > plane->max_size || queues > plane->count || offset % SV_INFLIGHT_ALIGN ||
	    size < (uint64_t)queues * sv_inflight_size(queue_size) || size > UINT32_MAX)
		return -EINVAL;
	mapping = mmap(NULL, size + slack, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
		       (off_t)(offset - slack));
	if (mapping == MAP_FAILED)
		return -errno;
	unmap_inflight(plane);
	plane->inflight = mapping;
	plane->inflight_bytes = size + slack;
	plane->inflight_start = slack;
	plane->inflight_queues = queues;
	plane->inflight_size = queue_size;
	return 0;
}

int sv_queue_start(struct sv_plane *plane, unsigned int index, const struct sv_ring_setup *setup)
{
	struct sv_inflight_queue *inflight = NULL;

	if (index >= plane->count || setup->size > plane->max_size)
		return -EINVAL;
	if (plane->queues[index].running)
		return -EBUSY;
	if (plane->inflight && index < plane->inflight_queues) {
		// The record holds queues of one size; a smaller one uses its first part.
		if (setup->size > plane->inflight_size)
			return -EINVAL;
		inflight = (void *)(plane->inflight + plane->inflight_start +
				    index * sv_inflight_size(plane->inflight_size));
	}
	return sv_queue_run(&plane->queues[index], &plane->memory, setup, inflight);
}

int sv_queue_stop(struct sv_plane *plane, unsigned int index)
{
	return index < plane->count ? sv_queue_end(&plane->queues[index]) : -EINVAL;
}

int sv_queue_set_call(struct sv_plane *plane, unsigned int index, int fd)
{
	if (index >= plane->count)
		return -EINVAL;
	return sv_signals_set_call(&plane->queues[index].signals, fd);
}

const char *sv_queue_broken(struct sv_plane *plane, unsigned int index)
{
	if (index >= plane->count ||
	    !__atomic_load_n(&plane->queues[index].counters->broken, __ATOMIC_ACQUIRE))
		return NULL;
	return plane->queues[index].vq.reason;
}

int sv_plane_resize(struct sv_plane *plane, uint64_t size)
{
	if (size > INT64_MAX - SV_BLK_SECTOR)
		return -EINVAL;
	__atomic_store_n(&plane->disk.size, size, __ATOMIC_RELAXED);
	__atomic_store_n(&plane->disk.capacity, (size + SV_BLK_SECTOR - 1) / SV_BLK_SECTOR,
			 __ATOMIC_RELAXED);
	sv_blk_measure(&plane->disk);
	return 0;
}

int sv_plane_watch_failures(struct sv_plane *plane, int event_fd)
{
	if (is_running(plane))
		return -EBUSY;
	plane->disk.failures.event_fd = event_fd;
	return 0;
}

uint64_t sv_plane_failures(const struct sv_plane *plane, unsigned int type, int *error)
{
	const struct sv_blk_failures *failures = &plane->disk.failures;
	uint64_t count;

	if (type >= SV_BLK_OTHER)
		return 0;
	// The error after the count that covers it: another one may have come meanwhile, then
	// that one is told twice.
	count = __atomic_load_n(&failures->count[type], __ATOMIC_ACQUIRE);
	*error = __atomic_load_n(&failures->error[type], __ATOMIC_RELAXED);
	return count;
}

int sv_plane_set_limits(struct sv_plane *plane, const struct sv_limits *limits)
{
	return sv_throttle_set(&plane->disk.throttle, limits, sv_now_ns());
}

void sv_plane_set_poll(struct sv_plane *plane, uint64_t limit_ns)
{
	for (unsigned int i = 0; i < plane->count; i++)
		plane->queues[i].poll_limit = limit_ns;
}
