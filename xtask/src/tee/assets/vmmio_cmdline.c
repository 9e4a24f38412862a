// registers virtio-mmio platform devices given as device=SIZE@BASE:IRQ, for kernels without CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/io.h>
static int id;
static struct device parent = { .init_name = "virtio-mmio-cmdline" };
static bool have_parent;
static int add(const char *s, const struct kernel_param *kp)
{
	struct resource r[2] = {}; unsigned long long base, size; unsigned int irq; char *end; int n;
	size = memparse(s, &end);
	if (*end != '@' || sscanf(end + 1, "%lli:%u%n", &base, &irq, &n) < 2) return -EINVAL;
	r[0].flags = IORESOURCE_MEM; r[0].start = base; r[0].end = base + size - 1;
	r[1].flags = IORESOURCE_IRQ; r[1].start = r[1].end = irq;
	if (!have_parent) { if (device_register(&parent)) return -ENODEV; have_parent = true; }
	return PTR_ERR_OR_ZERO(platform_device_register_resndata(&parent, "virtio-mmio", id++, r, 2, NULL, 0));
}
static const struct kernel_param_ops ops = { .set = add };
module_param_cb(device, &ops, NULL, 0200);
MODULE_LICENSE("GPL");
static int __init ini(void) { return 0; }
module_init(ini);
