// vcpu.c
struct sv_machine;
struct sv_virtio;
struct sv_uart;
struct kvm_run;

struct sv_vcpu {
	uint64_t exit_address;
	uint64_t exit_value;
	uint32_t exit_size;
	int run_errno;
	int fd;
	uint64_t served;
	uint64_t forwarded;
	uint64_t kicks;
	struct kvm_run *run;
	...;
};
int sv_vcpu_create(int vm_fd, uint32_t index, int run_size, struct sv_machine *machine, struct sv_vcpu **vcpu);
int sv_vcpu_destroy(struct sv_vcpu *vcpu);
int sv_vcpu_bind(struct sv_vcpu *vcpu);
void sv_vcpu_unbind(struct sv_vcpu *vcpu);
int sv_vcpu_confine(bool capabilities, bool calls);
int sv_vcpu_run(struct sv_vcpu *vcpu);
int sv_vcpu_finish(struct sv_vcpu *vcpu);
void sv_vcpu_complete_read(struct sv_vcpu *vcpu, uint64_t value);
void sv_vcpu_kick(struct sv_vcpu *vcpu);

// machine.c
#define SV_SLEEP_TYPE_S5 ...
#define SV_RESET_VALUE ...
#define SV_MAX_VIRTIO ...
#define SV_SERVED ...
#define SV_FORWARD ...
int sv_machine_create(struct sv_machine **machine);
void sv_machine_destroy(struct sv_machine *machine);
int sv_machine_add_uart(struct sv_machine *machine, uint16_t port, struct sv_uart *uart);
int sv_machine_add_power(struct sv_machine *machine, uint64_t base);
int sv_machine_add_virtio(struct sv_machine *machine, uint64_t base, struct sv_virtio *device);
#define SV_HOLD_NOTHING ...
#define SV_HOLD_ACCESSES ...
#define SV_HOLD_GUEST ...
void sv_machine_hold(struct sv_machine *machine, int what);
void sv_machine_wait_entered(struct sv_machine *machine, uint64_t ns);
int sv_machine_forward_ports(struct sv_machine *machine, uint32_t port, uint32_t count);
int sv_machine_port(struct sv_machine *machine, uint16_t port, uint32_t size, bool write, uint8_t *data);
int sv_machine_mmio(struct sv_machine *machine, uint64_t address, uint32_t size, bool write, uint8_t *data);

// virtio.c, virtio_mmio.c
#define SV_VIRTIO_CONFIG_SIZE ...
#define SV_VIRTIO_MAX_QUEUES ...
struct sv_virtio_draft {
	uint32_t size;
	uint64_t desc;
	uint64_t avail;
	uint64_t used;
};
int sv_virtio_create(uint32_t device_id, const uint32_t *queue_sizes, uint32_t queue_count, struct sv_virtio **out);
void sv_virtio_put(struct sv_virtio *device);
void sv_virtio_set_status(struct sv_virtio *device, uint32_t status);
void sv_virtio_set_generation(struct sv_virtio *device, uint32_t generation);
void sv_virtio_set_offered(struct sv_virtio *device, uint64_t features);
int sv_virtio_set_config(struct sv_virtio *device, const uint8_t *config, uint32_t length);
void sv_virtio_forget(struct sv_virtio *device);
uint64_t sv_virtio_driver_features(struct sv_virtio *device);
uint32_t sv_virtio_device_features_sel(struct sv_virtio *device);
uint32_t sv_virtio_queue_sel(struct sv_virtio *device);
int sv_virtio_queue(struct sv_virtio *device, uint32_t index, struct sv_virtio_draft *draft);
int sv_virtio_set_ready(struct sv_virtio *device, uint32_t index, bool ready);
void sv_virtio_reset(struct sv_virtio *device);
void sv_virtio_set_live(struct sv_virtio *device, bool live);
void sv_virtio_raise(struct sv_virtio *device, uint32_t bits);
int sv_virtio_mmio(struct sv_virtio *device, uint32_t offset, uint32_t size, bool write, uint8_t *data);

// rtc.c
uint8_t sv_rtc_read(uint8_t index);

// uart.c
#define SV_UART_RX_SIZE ...
#define SV_UART_TX_SIZE ...
int sv_uart_create(int vm_fd, uint32_t gsi, int irq_event_fd, struct sv_uart **uart);
void sv_uart_destroy(struct sv_uart *uart);
int sv_uart_output_fd(struct sv_uart *uart);
int sv_uart_take_output(struct sv_uart *uart, void *buffer, uint32_t limit);
int sv_uart_put_input(struct sv_uart *uart, const void *data, uint32_t length);
void sv_uart_reset(struct sv_uart *uart);
uint8_t sv_uart_read(struct sv_uart *uart, uint32_t offset);
void sv_uart_write(struct sv_uart *uart, uint32_t offset, uint8_t value);

// memory.c
struct sv_mapping {
	uint64_t address;
	uint64_t size;
	uint64_t reserved_address;
	uint64_t reserved_size;
};
int sv_memory_memfd(const char *name, uint64_t size, uint64_t huge_page_size);
int sv_memory_lock(int fd);
int64_t sv_memory_page_size(int fd);
int sv_memory_map(int fd, uint64_t size, uint64_t page_size, int dump, struct sv_mapping *mapping);
void sv_memory_unmap(struct sv_mapping *mapping);
int sv_memory_populate(struct sv_mapping *mapping, uint64_t page_size, uint32_t threads);

// huge.c
struct sv_huge;
bool sv_huge_is_wanted(void);
bool sv_huge_collapse(uint64_t start, uint64_t end);
#define SV_MAX_AHEAD ...
struct sv_ahead {
	uint64_t offset;
	uint32_t count;
	bool down;
};
int sv_huge_start(int fd, const struct sv_mapping *mapping, uint64_t least, const struct sv_ahead *ahead, uint32_t ahead_count, bool capabilities, bool calls, struct sv_huge **huge);
void sv_huge_hold(struct sv_huge *huge, bool held);
uint64_t sv_huge_made(struct sv_huge *huge);
void sv_huge_stop(struct sv_huge *huge);
int sv_huge_confine(bool capabilities, bool calls);

// load.c
struct sv_load;
struct sv_piece {
	int fd;
	uint64_t offset;
	uint64_t length;
	uint64_t zeroes;
	uint64_t address;
};
int sv_load_start(int memory_fd, uint64_t page_size, const struct sv_mapping *mapping, const struct sv_piece *pieces, uint32_t count, struct sv_load **load);
int sv_load_wait(struct sv_load *load, uint32_t *failed);

// kvm.c
int sv_ioctl(int fd, unsigned long request, void *argument);
int sv_ioctl_value(int fd, unsigned long request, unsigned long value);
#define SV_FIRST_RESULT ...
struct sv_call {
	int fd;
	int result;
	unsigned long request;
	void *argument;
};
struct sv_batch;
int sv_batch_start(struct sv_call *calls, uint32_t count, struct sv_batch **batch);
uint32_t sv_batch_wait(struct sv_batch *batch);
int sv_thread_id(void);
struct sv_failure {
	uint32_t reason;
	uint32_t suberror;
	uint32_t count;
	uint64_t data[16];
	uint32_t insn_size;
	uint8_t insn[15];
	uint64_t hardware_reason;
	uint32_t cpu;
	...;
};
void sv_vcpu_failure(struct sv_vcpu *vcpu, struct sv_failure *failure);

// <linux/kvm.h>
#define KVM_API_VERSION ...
#define KVM_GET_API_VERSION ...
#define KVM_CREATE_VM ...
#define KVM_CHECK_EXTENSION ...
#define KVM_GET_VCPU_MMAP_SIZE ...
#define KVM_GET_SUPPORTED_CPUID ...
#define KVM_GET_MSR_INDEX_LIST ...
#define KVM_SET_USER_MEMORY_REGION ...
#define KVM_SET_TSS_ADDR ...
#define KVM_SET_IDENTITY_MAP_ADDR ...
#define KVM_CREATE_IRQCHIP ...
#define KVM_CREATE_PIT2 ...
#define KVM_GET_IRQCHIP ...
#define KVM_SET_IRQCHIP ...
#define KVM_GET_PIT2 ...
#define KVM_SET_PIT2 ...
#define KVM_IRQ_LINE ...
#define KVM_IRQFD ...
#define KVM_IOEVENTFD ...
#define KVM_GET_CLOCK ...
#define KVM_SET_CLOCK ...
#define KVM_KVMCLOCK_CTRL ...
#define KVM_GET_REGS ...
#define KVM_SET_REGS ...
#define KVM_GET_SREGS ...
#define KVM_SET_SREGS ...
#define KVM_GET_FPU ...
#define KVM_SET_FPU ...
#define KVM_GET_LAPIC ...
#define KVM_SET_LAPIC ...
#define KVM_GET_MSRS ...
#define KVM_SET_MSRS ...
#define KVM_SET_CPUID2 ...
#define KVM_GET_MP_STATE ...
#define KVM_SET_MP_STATE ...
#define KVM_GET_VCPU_EVENTS ...
#define KVM_SET_VCPU_EVENTS ...
#define KVM_GET_DEBUGREGS ...
#define KVM_SET_DEBUGREGS ...
#define KVM_GET_XCRS ...
#define KVM_SET_XCRS ...
#define KVM_GET_XSAVE ...
#define KVM_SET_XSAVE ...
#define KVM_GET_TSC_KHZ ...

#define KVM_CAP_IRQCHIP ...
#define KVM_CAP_USER_MEMORY ...
#define KVM_CAP_SET_TSS_ADDR ...
#define KVM_CAP_EXT_CPUID ...
#define KVM_CAP_MP_STATE ...
#define KVM_CAP_PIT2 ...
#define KVM_CAP_IRQFD ...
#define KVM_CAP_IOEVENTFD ...
#define KVM_CAP_SET_IDENTITY_MAP_ADDR ...
#define KVM_CAP_VCPU_EVENTS ...
#define KVM_CAP_ADJUST_CLOCK ...
#define KVM_CAP_IMMEDIATE_EXIT ...
#define KVM_CAP_MAX_VCPUS ...
#define KVM_CAP_NR_MEMSLOTS ...
#define KVM_CAP_TSC_DEADLINE_TIMER ...

#define KVM_MEM_READONLY ...
#define KVM_PIT_SPEAKER_DUMMY ...
#define KVM_IRQFD_FLAG_DEASSIGN ...
#define KVM_IOEVENTFD_FLAG_DATAMATCH ...
#define KVM_IOEVENTFD_FLAG_DEASSIGN ...
#define KVM_MP_STATE_RUNNABLE ...
#define KVM_MP_STATE_UNINITIALIZED ...
#define KVM_EXIT_INTERNAL_ERROR ...
#define KVM_EXIT_FAIL_ENTRY ...
#define KVM_EXIT_SHUTDOWN ...
#define KVM_INTERNAL_ERROR_EMULATION ...

struct kvm_userspace_memory_region {
	uint32_t slot;
	uint32_t flags;
	uint64_t guest_phys_addr;
	uint64_t memory_size;
	uint64_t userspace_addr;
};
struct kvm_pit_config { uint32_t flags; ...; };
struct kvm_irqfd { uint32_t fd; uint32_t gsi; uint32_t flags; ...; };
struct kvm_irq_level { uint32_t irq; uint32_t level; ...; };
struct kvm_ioeventfd {
	uint64_t datamatch;
	uint64_t addr;
	uint32_t len;
	int32_t fd;
	uint32_t flags;
	...;
};
struct kvm_clock_data { uint64_t clock; uint32_t flags; ...; };
struct kvm_irqchip { uint32_t chip_id; ...; };
struct kvm_pit_state2 { uint32_t flags; ...; };
struct kvm_regs {
	uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp;
	uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
	uint64_t rip, rflags;
};
struct kvm_segment {
	uint64_t base;
	uint32_t limit;
	uint16_t selector;
	uint8_t type;
	uint8_t present, dpl, db, s, l, g, avl;
	uint8_t unusable;
	...;
};
struct kvm_dtable { uint64_t base; uint16_t limit; ...; };
struct kvm_sregs {
	struct kvm_segment cs, ds, es, fs, gs, ss;
	struct kvm_segment tr, ldt;
	struct kvm_dtable gdt, idt;
	uint64_t cr0, cr2, cr3, cr4, cr8;
	uint64_t efer;
	uint64_t apic_base;
	...;
};
struct kvm_fpu { uint16_t fcw; uint32_t mxcsr; ...; };
struct kvm_lapic_state { char regs[...]; ...; };
struct kvm_msr_entry { uint32_t index; uint64_t data; ...; };
struct kvm_msrs { uint32_t nmsrs; struct kvm_msr_entry entries[]; ...; };
struct kvm_msr_list { uint32_t nmsrs; uint32_t indices[]; };
struct kvm_cpuid_entry2 {
	uint32_t function, index, flags, eax, ebx, ecx, edx;
	...;
};
struct kvm_cpuid2 { uint32_t nent; struct kvm_cpuid_entry2 entries[]; ...; };
struct kvm_mp_state { uint32_t mp_state; };
struct kvm_vcpu_events { ...; };
struct kvm_debugregs { ...; };
struct kvm_xcrs { ...; };
struct kvm_xsave { ...; };

// <linux/vhost.h>
#define VHOST_GET_FEATURES ...
#define VHOST_SET_FEATURES ...
#define VHOST_SET_OWNER ...
#define VHOST_SET_MEM_TABLE ...
#define VHOST_SET_VRING_NUM ...
#define VHOST_SET_VRING_ADDR ...
#define VHOST_SET_VRING_BASE ...
#define VHOST_GET_VRING_BASE ...
#define VHOST_SET_VRING_KICK ...
#define VHOST_SET_VRING_CALL ...
#define VHOST_SET_VRING_ERR ...
#define VHOST_VSOCK_SET_GUEST_CID ...
#define VHOST_VSOCK_SET_RUNNING ...

struct vhost_vring_state { unsigned int index; unsigned int num; };
struct vhost_vring_file { unsigned int index; int fd; };
struct vhost_vring_addr {
	unsigned int index;
	unsigned int flags;
	uint64_t desc_user_addr;
	uint64_t used_user_addr;
	uint64_t avail_user_addr;
	uint64_t log_guest_addr;
};
struct vhost_memory_region {
	uint64_t guest_phys_addr;
	uint64_t memory_size;
	uint64_t userspace_addr;
	...;
};
struct vhost_memory { uint32_t nregions; struct vhost_memory_region regions[]; ...; };
