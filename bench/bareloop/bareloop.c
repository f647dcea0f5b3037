// bareloop GUEST.ELF COMMANDS: the least that can run the test guest; every exit is answered at once.
//
// What the guest measures in it is the price of an exit itself: KVM, the way to user space and
// back.  A virtual machine monitor adds to that.  COMMANDS is the guest's `script=`; its answers
// come out on standard output, "ready" ends the run.
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/kvm.h>

#define RAM (128u << 20)
#define COM1 0x3f8
#define LSR_EMPTY 0x60
#define START_INFO 0x6000
#define MEMORY_MAP 0x6100
#define COMMAND_LINE 0x20000
#define PVH_MAGIC 0x336ec578
#define PVH_NOTE 18

static uint8_t *ram;
static char last[16]; // the end of what the guest said

static void check(long result, const char *what)
{
	if (result < 0) {
		fprintf(stderr, "bareloop: %s: %s\n", what, strerror(errno));
		exit(1);
	}
}

// The guest's segments into RAM; the entry point that its PVH note names.
static uint32_t load(const char *path)
{
	static uint8_t file[16 << 20];
	const Elf64_Ehdr *header = (void *)file;
	int fd = open(path, O_RDONLY);
	uint32_t entry = 0;

	check(fd, path);
	check(read(fd, file, sizeof(file)), path);
	close(fd);
	for (int i = 0; i < header->e_phnum; i++) {
		const Elf64_Phdr *part = (void *)(file + header->e_phoff + i * sizeof(*part));
		const Elf64_Nhdr *note = (void *)(file + part->p_offset);

		if (part->p_type == PT_LOAD)
			memcpy(ram + part->p_paddr, file + part->p_offset, part->p_filesz);
		if (part->p_type == PT_NOTE && note->n_type == PVH_NOTE)
			entry = *(uint32_t *)((uint8_t *)(note + 1) + 4); // behind the name "Xen"
	}
	if (!entry) {
		fprintf(stderr, "bareloop: %s has no PVH entry\n", path);
		exit(1);
	}
	return entry;
}

// Source: Xen, public/arch-x86/hvm/start_info.h.
static void tell_guest(const char *commands)
{
	struct {
		uint32_t magic, version, flags, modules;
		uint64_t module_list, command_line, rsdp, memory_map;
		uint32_t entries, reserved;
	} info = {PVH_MAGIC, 1, 0, 0, 0, COMMAND_LINE, 0, MEMORY_MAP, 1, 0};
	struct {
		uint64_t address, size;
		uint32_t type, reserved;
	} map = {0, RAM, 1, 0};

	memcpy(ram + START_INFO, &info, sizeof(info));
	memcpy(ram + MEMORY_MAP, &map, sizeof(map));
	snprintf((char *)ram + COMMAND_LINE, 4096, "script=%s", commands);
}

static void set_up(int kvm, int vcpu, uint32_t entry)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} cpuid = {.head = {.nent = 256}};
	struct kvm_segment flat = {.limit = 0xffffffff, .selector = 16, .type = 3, .present = 1,
				   .db = 1, .s = 1, .g = 1};
	struct kvm_regs regs = {.rip = entry, .rbx = START_INFO, .rflags = 2};
	struct kvm_sregs sregs;

	check(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), "KVM_GET_SUPPORTED_CPUID");
	check(ioctl(vcpu, KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2");
	check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
	flat.type = 11;
	flat.selector = 8;
	sregs.cs = flat;
	sregs.cr0 = 0x11;
	check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static void say(const uint8_t *text, uint32_t length)
{
	fwrite(text, 1, length, stdout);
	while (length--) {
		memmove(last, last + 1, sizeof(last) - 2);
		last[sizeof(last) - 2] = (char)*text++;
	}
	if (!strcmp(last + sizeof(last) - 1 - 6, "ready\n"))
		exit(fflush(stdout) ? 1 : 0);
}

int main(int argc, char **argv)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm, vcpu;
	struct kvm_userspace_memory_region region = {.memory_size = RAM};
	struct kvm_run *run;

	if (argc != 3)
		return 2;
	check(kvm, "/dev/kvm");
	check(vm = ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	check(ram == MAP_FAILED ? -1 : 0, "guest RAM");
	region.userspace_addr = (uint64_t)ram;
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	check(ioctl(vm, KVM_CREATE_IRQCHIP), "KVM_CREATE_IRQCHIP");
	check(vcpu = ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	run = mmap(NULL, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE,
		   MAP_SHARED, vcpu, 0);
	check(run == MAP_FAILED ? -1 : 0, "vCPU");
	tell_guest(argv[2]);
	set_up(kvm, vcpu, load(argv[1]));
	for (;;) {
		uint8_t *data = (uint8_t *)run + run->io.data_offset;

		if (ioctl(vcpu, KVM_RUN, 0) < 0) {
			check(errno == EINTR || errno == EAGAIN ? 0 : -1, "KVM_RUN");
			continue;
		}
		if (run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_IN) {
			memset(data, run->io.port == COM1 + 5 ? LSR_EMPTY : 0xff, run->io.size);
		} else if (run->exit_reason == KVM_EXIT_IO) {
			if (run->io.port == COM1)
				say(data, run->io.size * run->io.count);
		} else if (run->exit_reason == KVM_EXIT_MMIO) {
			if (!run->mmio.is_write)
				memset(run->mmio.data, 0, sizeof(run->mmio.data));
		} else if (run->exit_reason != KVM_EXIT_INTR) {
			fprintf(stderr, "bareloop: exit %u\n", run->exit_reason);
			return 1;
		}
	}
}
