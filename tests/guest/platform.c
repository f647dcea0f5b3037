// What the loader and the firmware tables say: memory map, command line, ACPI, MP table.
#include "guest.h"

#define PVH_MAGIC 0x336ec578
#define E820_RAM 1

struct __attribute__((packed)) sdt {
	char signature[4];
	u32 length;
	u8 revision, checksum;
	char oem[6], table_id[8];
	u32 oem_revision, creator, creator_revision;
};
struct __attribute__((packed)) gas {
	u8 space, width, offset, access;
	u64 address;
};

const char *command_line(void)
{
	if (boot_pvh)
		return (const char *)*(u64 *)(boot_pvh + 24);
	return (const char *)(u64)read32(boot_zero_page + 0x228);
}

void mem_command(void)
{
	u64 total = 0;

	if (boot_pvh) {
		const u64 *entry = (const u64 *)*(u64 *)(boot_pvh + 40);
		u32 count = read32(boot_pvh + 48);

		if (read32(boot_pvh) != PVH_MAGIC) {
			print("fail mem start-info magic 0x%x\n", (u64)read32(boot_pvh));
			return;
		}
		for (; count; count--, entry += 3) {
			print("note mem 0x%x+0x%x type=%u\n", entry[0], entry[1], entry[2] & 0xffffffff);
			if ((u32)entry[2] == E820_RAM)
				total += entry[1];
		}
	} else {
		u32 count = read8(boot_zero_page + 0x1e8);

		for (u64 entry = boot_zero_page + 0x2d0; count; count--, entry += 20) {
			u64 base = *(u64 *)entry, size = *(u64 *)(entry + 8);

			print("note mem 0x%x+0x%x type=%u\n", base, size, (u64)read32(entry + 16));
			if (read32(entry + 16) == E820_RAM)
				total += size;
		}
	}
	print("ok mem ram=%u boot=%s\n", total, boot_pvh ? "pvh" : "64bit");
}

// Where the loader put the initrd, and its CRC-32.
void initrd_command(void)
{
	u64 address = 0, size = 0;

	if (boot_pvh && read32(boot_pvh + 12)) {
		const u64 *module = (const u64 *)*(u64 *)(boot_pvh + 16);

		address = module[0];
		size = module[1];
	} else if (!boot_pvh) {
		address = read32(boot_zero_page + 0x218);
		size = read32(boot_zero_page + 0x21c);
	}
	print("%s initrd address=0x%x size=%u crc=0x%x\n", size ? "ok" : "fail", address, size,
	      size ? run_user(user_crc32, address, size, 0, 0) : 0);
}

static bool sum_is_zero(u64 address, u32 length)
{
	u8 sum = 0;

	while (length--)
		sum += read8(address++);
	return !sum;
}

static u64 scan(u64 from, u64 to, const char *signature, u32 length)
{
	for (; from < to; from += 16)
		if (!memcmp((void *)from, signature, length))
			return from;
	return 0;
}

static u64 find_rsdp(void)
{
	u64 address = boot_pvh ? *(u64 *)(boot_pvh + 32) : *(u64 *)(boot_zero_page + 0x70);

	if (!address)
		address = scan(0xe0000, 0x100000, "RSD PTR ", 8);
	return address;
}

static struct sdt *find_table(const char *signature)
{
	u64 rsdp = find_rsdp(), xsdt = rsdp ? *(u64 *)(rsdp + 24) : 0;

	if (!xsdt)
		return NULL;
	for (u32 offset = 36; offset + 8 <= ((struct sdt *)xsdt)->length; offset += 8) {
		struct sdt *table = (struct sdt *)*(u64 *)(xsdt + offset);

		if (!memcmp(table->signature, signature, 4))
			return table;
	}
	return NULL;
}

static bool show_table(struct sdt *table)
{
	bool right = sum_is_zero((u64)table, table->length);

	print("note acpi %c%c%c%c length=%u%s\n", table->signature[0], table->signature[1],
	      table->signature[2], table->signature[3], (u64)table->length,
	      right ? "" : " bad-checksum");
	return right;
}

void acpi_command(void)
{
	u64 rsdp = find_rsdp(), xsdt = rsdp ? *(u64 *)(rsdp + 24) : 0;
	bool right = rsdp && sum_is_zero(rsdp, 20) && sum_is_zero(rsdp, 36) && xsdt;
	struct sdt *fadt;

	if (!right) {
		print("fail acpi rsdp=0x%x xsdt=0x%x\n", rsdp, xsdt);
		return;
	}
	right = show_table((struct sdt *)xsdt);
	for (u32 offset = 36; offset + 8 <= ((struct sdt *)xsdt)->length; offset += 8)
		right &= show_table((struct sdt *)*(u64 *)(xsdt + offset));
	fadt = find_table("FACP");
	right &= fadt && show_table((struct sdt *)*(u64 *)((u64)fadt + 140));
	print("%s acpi flags=0x%x cpus=%u\n", right ? "ok" : "fail",
	      fadt ? (u64)read32((u64)fadt + 112) : 0, (u64)firmware_cpus());
}

static u64 find_mptable(void)
{
	u64 ebda = (u64)(read8(0x40e) | read8(0x40f) << 8) << 4;
	u64 pointer = 0;

	if (ebda >= 0x80000 && ebda < 0xa0000)
		pointer = scan(ebda, ebda + 1024, "_MP_", 4);
	if (!pointer)
		pointer = scan(0x9fc00, 0xa0000, "_MP_", 4);
	if (!pointer)
		pointer = scan(0xf0000, 0x100000, "_MP_", 4);
	return pointer && sum_is_zero(pointer, 16) ? pointer : 0;
}

void mptable_command(void)
{
	u64 pointer = find_mptable(), table = pointer ? read32(pointer + 4) : 0, entry = table + 44;
	u64 kinds[5] = { 0 };

	if (!table || memcmp((void *)table, "PCMP", 4) ||
	    !sum_is_zero(table, *(u16 *)(table + 4))) {
		print("fail mptable pointer=0x%x table=0x%x\n", pointer, table);
		return;
	}
	for (u32 count = *(u16 *)(table + 34); count; count--) {
		u8 kind = read8(entry);

		if (kind > 4) {
			print("fail mptable entry kind %u\n", (u64)kind);
			return;
		}
		kinds[kind]++;
		entry += kind ? 8 : 20;
	}
	print("ok mptable cpus=%u buses=%u ioapics=%u interrupts=%u local=%u\n", kinds[0], kinds[1],
	      kinds[2], kinds[3], kinds[4]);
}

// Enabled processors in the MADT, else in the MP table, else 1.
u32 firmware_cpus(void)
{
	struct sdt *madt = find_table("APIC");
	u32 count = 0;
	u64 table;

	if (madt) {
		for (u64 entry = (u64)madt + 44; entry < (u64)madt + madt->length;
		     entry += read8(entry + 1)) {
			if (!read8(entry + 1))
				break;
			if (read8(entry) == 0 && read32(entry + 4) & 1)
				count++;
			if (read8(entry) == 9 && read32(entry + 8) & 1)
				count++;
		}
		return count ? count : 1;
	}
	table = find_mptable();
	if (table) {
		u64 entry = (u64)read32(table + 4);
		u32 entries = *(u16 *)(entry + 34);

		for (entry += 44; entries; entries--, entry += read8(entry) ? 8 : 20)
			if (!read8(entry) && read8(entry + 3) & 1)
				count++;
	}
	return count ? count : 1;
}

// SLP_TYP of S5: the first element of the DSDT's package _S5.
static u32 sleep_type(struct sdt *fadt)
{
	u64 dsdt = *(u64 *)((u64)fadt + 140);

	for (u64 at = dsdt + 36; at + 8 < dsdt + ((struct sdt *)dsdt)->length; at++)
		if (!memcmp((void *)at, "_S5_", 4)) {
			at += 4 + 1; // PackageOp
			at += 1 + (read8(at) >> 6) + 1; // package length, element count
			return read8(at) == 0x0a ? read8(at + 1) : read8(at) & 1;
		}
	return 5;
}

bool acpi_power_off(void)
{
	struct sdt *fadt = find_table("FACP");
	struct gas *control = (struct gas *)((u64)fadt + 244);
	u8 value;

	if (!fadt || fadt->length < 268 || !control->address)
		return false;
	value = (u8)(sleep_type(fadt) << 2 | 0x20);
	if (control->space)
		outb((u16)control->address, value);
	else
		write8(control->address, value);
	return true;
}

bool acpi_reset(void)
{
	struct sdt *fadt = find_table("FACP");
	struct gas *reset = (struct gas *)((u64)fadt + 116);

	if (!fadt || !reset->address)
		return false;
	if (reset->space)
		outb((u16)reset->address, read8((u64)fadt + 128));
	else
		write8(reset->address, read8((u64)fadt + 128));
	return true;
}
